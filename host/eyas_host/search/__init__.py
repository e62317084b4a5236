"""Hyperparameter search by grid or TPE, and the baseline trained from scratch."""
