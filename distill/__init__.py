"""Distil the reasoning of an R1-style teacher into a small dense student, and measure what that gained."""

__version__ = "0.1.0"
