"""Make a trained network smaller and faster: pruning and quantization."""
