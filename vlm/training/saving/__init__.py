"""Checkpoints: written whole, verified, and gone on from."""
