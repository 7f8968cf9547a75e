"""Compares the Flax model and the PyTorch model, from their weights to their training."""
