"""What a training run draws from sources: an order, a mixture, and batches."""
