"""Retrieval metrics, FAISS indexes, search and evaluation."""
