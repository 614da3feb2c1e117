"""What updates weights, by how much, and when."""
