"""Decides, from measurements and exact bytes, which group gets which type."""
