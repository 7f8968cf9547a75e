"""Speed, compile time and memory, each measured together with its yardstick: `python -m benchmarks`."""
