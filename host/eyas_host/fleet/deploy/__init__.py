"""Bring a bundle to a device, and measure it there."""
