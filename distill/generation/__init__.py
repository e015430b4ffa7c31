"""The trace stage's parts: what is wanted (plan, asks), what is there (finished), what comes in (recorder, verify)."""
