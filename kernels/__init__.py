"""Pure functions over tensors. Each operation has a folder: its definition and its fast forms."""
