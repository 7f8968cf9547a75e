"""What surrounds the steps of a run: its options and preparation, log, signals, processes."""
