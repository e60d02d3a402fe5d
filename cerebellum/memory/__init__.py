"""Tells how much memory a model takes on a graphics card."""
