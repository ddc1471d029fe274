"""Cushion: a config-driven experiment framework for activation outliers and prefix methods in quantized LLMs."""

__version__ = "0.1.0"
