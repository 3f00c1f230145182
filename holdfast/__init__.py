"""Holdfast: train one policy on several objectives without losing any of them."""

__version__ = "0.1.0"
