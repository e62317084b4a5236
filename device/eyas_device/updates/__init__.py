"""Model updates: two slots for bundles, and the golden check that a bundle must pass."""
