"""Commands to devices: sent to those that are connected, each with its answer."""
