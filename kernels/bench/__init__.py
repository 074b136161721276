"""Benchmarks of the kernels, as data: python -m longreach.kernels.bench, on a GPU."""
