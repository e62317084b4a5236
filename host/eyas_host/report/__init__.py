"""What a run found: `report.json`, one self-contained `report.html`, and the model card."""
