"""Bytes to tensors: safe decoding and transforms."""
