"""Breaks a running cluster in one way at a time, and counts what its clients notice.

    python -m longreach.loadtest.chaos --config configs/laptop.yaml --scenarios 'kill-*-idle'

It speaks HTTP to the cluster and signals to its processes, and imports nothing of either.
"""
