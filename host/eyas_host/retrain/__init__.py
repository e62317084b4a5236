"""The next version: trained from the one that serves, on old and new images, and kept only if it is better."""
