"""Which file holds which weights: saving, restoring, exporting, converting."""
