"""Estimates with their uncertainty: small functions over vectors, no I/O."""
