"""Around quantization: calibration images, mixed precision, sensitivity, float fallback."""
