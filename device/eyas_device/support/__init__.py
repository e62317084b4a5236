"""Helpers of all rooms: child processes, files, TOML sections, names, clocks."""
