"""Helpers below everything else: atomic files, progress, machine facts, quiet libraries, errors."""
