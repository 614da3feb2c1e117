"""Vectors on disk, and how they are searched: embeddings, FAISS indexes, index folders."""
