"""Readers for the benchmarks that people have on disk, each checked as it is opened."""
