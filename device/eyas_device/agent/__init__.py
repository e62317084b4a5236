"""The service: the frame loop and everything it reports to."""
