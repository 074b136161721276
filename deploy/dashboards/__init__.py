"""Grafana's dashboards, as code; `python -m longreach.deploy.dashboards` writes their files."""
