"""Drift of a fleet: what its devices report against what they reported on stable days and what the bundle recorded."""
