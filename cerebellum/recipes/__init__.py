"""Recipes, which are the types of a file's tensors: read out of a GGUF, made again, carried to another model."""
