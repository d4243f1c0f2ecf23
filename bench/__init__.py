"""Benchmarks, one module a question: `python -m bench.NAME`."""
