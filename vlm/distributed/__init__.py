"""Which ranks exchange what, with gradients."""
