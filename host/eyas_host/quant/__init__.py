"""int8 quantization of a network: folding, operation graph, quantizers, Q/DQ conversion, checkpoints."""
