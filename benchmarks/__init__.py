"""Benchmarks of the block against its reference; `python -m benchmarks.bench_block --help`."""
