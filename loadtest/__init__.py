"""Clients that speak to the endpoint as any user would."""
