"""The fleet server: devices reached over ssh, their broker, collector, store and live view. Needs no torch."""
