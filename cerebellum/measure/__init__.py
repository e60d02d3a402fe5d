"""Measures what each group of tensors costs, against a limit or as response curves."""
