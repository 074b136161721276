"""How many tokens a KV page holds: one number for kernels, pools and settings.

Apart from `pages`, which needs torch: whoever only checks a configuration does not load it.
"""

PAGE_TOKENS = 128


def pages_for(tokens: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)
