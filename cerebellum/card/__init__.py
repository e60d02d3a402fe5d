"""Writes the model card, the report and the charts from the artifacts of a finished run."""
