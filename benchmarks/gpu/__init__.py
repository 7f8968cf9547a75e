"""One GPU, compared with its plan and with PyTorch: `python -m benchmarks gpu`."""
