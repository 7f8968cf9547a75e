"""Speed, compilation and memory, each measured beside its yardstick in one run: `python -m benchmarks`."""
