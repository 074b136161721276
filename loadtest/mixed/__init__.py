"""Prompts of a thousand tokens beside those of a million, and how long each class waits.

    python -m longreach.loadtest.mixed --base-url http://127.0.0.1:8000 --rate 0.5

Asks any endpoint that speaks OpenAI's protocol, ours or a peer's, by HTTP alone. `mix` and `trace`
say how long prompts are, `arrivals` when they come; `plan` puts them together, `measure` sends
them, `summary` and `slo` judge what came of it, and `sweep` finds the highest load that holds;
`live`, `table`, `files` and `picture` show it.
"""
