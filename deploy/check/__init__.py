"""Checks what is deployed, without a cluster: `python -m longreach.deploy.check`.

Each check yields a `Problem` with its remedy: what cannot run is refused before it is applied.
"""
