"""Procedural volumes, their datasets, and the demo on them."""
