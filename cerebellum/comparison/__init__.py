"""Finished files of one model, compared on the same tokens: two of them (pair), or any number (judge)."""
