"""What people watch of a run, and where it goes."""
