"""What a network is worth: metrics, intervals, calibration, cost, parity, latency, the verdict."""
