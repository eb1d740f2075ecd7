"""Metrics, logs, pictures and the report of a run."""
