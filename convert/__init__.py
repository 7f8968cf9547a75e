"""Weights between the two frameworks: one table of names and transforms, and a stream of tensors each way."""
