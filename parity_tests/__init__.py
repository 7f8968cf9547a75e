"""Number by number: the Flax model and the PyTorch model compute the same."""
