"""Labelled pictures: the index, the split, the augmented views."""
