"""Labelled images: index, split, loading and augmentation."""
