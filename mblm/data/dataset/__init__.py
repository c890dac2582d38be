"""The datasets that the trainer knows by name."""
