"""Speed, compilation and memory, each measured with its yardstick in one run: `python -m benchmarks`."""
