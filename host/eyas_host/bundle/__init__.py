"""The bundle that goes to devices: packing, golden images, OOD reference, model card."""
