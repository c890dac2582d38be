"""Pages and pictures of how likely a model finds each byte of a text."""
