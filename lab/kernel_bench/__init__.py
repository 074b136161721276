"""Benchmarks of the kernels, as data: python -m longreach.lab.kernel_bench, on a GPU."""
