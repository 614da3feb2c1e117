"""Configuration, optimizer, schedule, checkpoints and the training loop."""
