"""Reaching a device: ssh, what it is fit for, the wheels that are installed there."""
