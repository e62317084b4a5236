"""The int8 grid: folding, the layer graph, quantizers, Q/DQ nodes, their checkpoints."""
