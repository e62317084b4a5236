"""The int8 grid: folding, the layer graph, quantizers, their checkpoints."""
