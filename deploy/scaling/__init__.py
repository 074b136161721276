"""What autoscaling does with a day's load; `python -m longreach.deploy.scaling` draws it."""
