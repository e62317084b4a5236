"""Versions of models: what each was made from, and which one is in use (`eyas models`)."""
