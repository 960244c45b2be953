"""Data sets: reading and converting records."""
