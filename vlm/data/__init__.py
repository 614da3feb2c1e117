"""Samples, verified shards, deterministic order and the loader."""
