"""Reports of a run: `report.json` and one self-contained `report.html`."""
