"""Sources and the input pipeline."""
