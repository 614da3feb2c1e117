"""Weights of other projects, read into bundles and written back."""
