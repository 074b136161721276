"""The Ray Serve application: settings, ingress, prefill gangs, decode replicas, metrics."""
