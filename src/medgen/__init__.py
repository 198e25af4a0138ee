"""Generative models for medical images, as MONAI bundles."""

__version__ = "0.1.0"
