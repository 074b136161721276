"""Manifests, alerts and dashboards."""
