"""Estimate memory and time of a training step on a device that you do not have."""
