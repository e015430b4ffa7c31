"""Traces that others made: read, mapped, and written down as a run's problems and traces."""
