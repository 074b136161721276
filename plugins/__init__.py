"""What puts the engine's attention into other people's engines."""
