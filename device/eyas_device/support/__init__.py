"""Helpers without a subject of their own: child processes, TOML sections, names, clocks."""
