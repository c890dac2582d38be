"""Incremental decoding: stage caches, the hierarchy's cache, sampling and sessions."""
