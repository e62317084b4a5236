"""Pruning: channels to a fraction of the MACs or to a measured latency, or single weights by magnitude."""
