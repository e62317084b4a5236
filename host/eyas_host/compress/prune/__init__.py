"""Channel pruning: to a fraction of the MACs, to a measured latency, or by magnitude."""
