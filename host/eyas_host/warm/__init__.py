"""Warm starts: students that begin with what an ImageNet teacher says about crops of a few free pictures."""
