"""Incremental decoding: the cache of rows and its engines, sampling, sessions, generation."""
