"""Input and output, streams, logging and other helpers that know nothing of models."""
