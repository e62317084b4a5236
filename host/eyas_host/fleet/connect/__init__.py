"""Connections to devices: SSH, preflight checks, wheels."""
