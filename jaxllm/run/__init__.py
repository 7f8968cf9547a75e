"""A run around its steps: preparation, checkpoints, history, log, signals, processes."""
