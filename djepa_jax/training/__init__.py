"""The loop around the training step."""
