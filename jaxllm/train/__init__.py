"""One training step: loss, optimizer, state, the step itself, and the devices that compute it."""
