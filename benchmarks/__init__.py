"""Benchmark scripts, and the tables of README and docs (`benchmarks.tables`)."""
