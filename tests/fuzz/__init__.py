"""Mutated files against everything that reads files: `python -m tests.fuzz --n 100000 --seed 1`."""
