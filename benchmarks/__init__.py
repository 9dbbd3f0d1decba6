"""Measurements: static costs of the compiled kernels, and timings, accuracy and memory on a GPU.
See benchmarks/README.md.
"""
