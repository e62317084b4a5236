"""Labelled images: the index, the split, the augmented views."""
