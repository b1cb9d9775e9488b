"""Comparison with public implementations, which run as programs of their own; see README.md."""
