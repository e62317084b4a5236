"""The search for good training settings: trials in a study, the best of them trained in full, a result to copy."""
