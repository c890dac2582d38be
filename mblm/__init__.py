"""Multiscale Byte Language Models: a hierarchy of causal stages that models bytes."""

__version__ = "0.5.0"
