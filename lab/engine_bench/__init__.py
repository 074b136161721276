"""The engine at a real model's size: what it takes, against what it could take at best."""
