"""Evaluation: metrics, confidence intervals, calibration, cost, parity, latency, and the verdict."""
