"""The stages of the main job, one file each; `chain` is their table."""
