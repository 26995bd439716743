"""Benchmarks, and reports that need no GPU. Run them from the root of the checkout."""
