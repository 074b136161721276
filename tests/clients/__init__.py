"""Real clients against a real endpoint: `make test-clients` runs them, and writes their page."""
