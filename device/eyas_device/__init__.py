"""The camera side of Eyas: capture, infer, report. Imports without any training framework."""

__version__ = "0.1.0"
