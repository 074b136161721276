"""Longreach on Kubernetes: manifests and images, what checks them, and what makes dashboards."""
