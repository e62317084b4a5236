"""Telemetry: the messages, how they are aggregated, spooled and sent, and which commands come back."""
