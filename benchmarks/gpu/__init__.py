"""What one GPU does, beside what was planned for it and beside PyTorch: `python -m benchmarks gpu`."""
