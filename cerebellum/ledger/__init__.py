"""The ledger: every measurement ever made in a run folder, immutable, one commit each."""

from cerebellum.ledger.store import Divergence, Ledger, SeriesKey

__all__ = ["Divergence", "Ledger", "SeriesKey"]
