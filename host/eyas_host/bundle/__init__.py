"""The bundle that goes to devices: packing, golden images, reference embeddings, the card."""
