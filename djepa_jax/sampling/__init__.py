"""From a trained model to files."""
