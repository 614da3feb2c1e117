"""What retrieval asks of a model, and how well it answers: pairs, protocol, ranks, scores."""
