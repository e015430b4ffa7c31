"""Making traces: what to ask, what came of it, what it cost."""
