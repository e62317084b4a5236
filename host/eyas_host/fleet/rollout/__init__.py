"""Rollouts: a new version goes to a fleet in waves that stop by themselves."""
