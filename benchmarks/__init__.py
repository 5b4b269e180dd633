"""Benchmarks: `python -m benchmarks.NAME [--quick]` prints its figures and ends with one line of JSON."""
