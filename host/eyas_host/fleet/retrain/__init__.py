"""From drift to a retraining: whether one is due, with which labelled samples, and who approved it."""
