"""Keeps every measurement ever made in a run folder: rows are immutable and each is a commit of its own."""

from cerebellum.ledger.store import Divergence, Ledger, SeriesKey

__all__ = ["Divergence", "Ledger", "SeriesKey"]
