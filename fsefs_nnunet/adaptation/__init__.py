"""Choosing a way to adapt, and students of what was adapted."""
