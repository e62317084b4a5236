"""Make a trained network smaller: pruning and quantization."""
