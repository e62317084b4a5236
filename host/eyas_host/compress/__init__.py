"""Making a student smaller: folding, quantization-aware training, pruning."""
