"""Contrastive losses: pure functions and their grouped form."""
