"""Datasets: bytes and images cut into sequences and shared out to the workers of a run."""
