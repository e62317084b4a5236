"""The stages of the main job, one file each; `chain` is the table of them."""
