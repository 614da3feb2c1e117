"""The grouped contrastive loss on a mesh of ranks, in one language or more, by micro-batches."""
