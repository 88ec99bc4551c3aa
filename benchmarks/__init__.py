"""Benchmarks of the inner loop, each a comparison side by side in one run: `make bench`, or `python -m benchmarks`."""
