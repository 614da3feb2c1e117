"""From images and texts to vectors: one at a time, in bulk, and kept in folders."""
