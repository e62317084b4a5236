"""The telemetry store: tables, queries, retention."""
