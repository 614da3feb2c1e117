"""What a run would take, found without training."""
