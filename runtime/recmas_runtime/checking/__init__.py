"""Checks of a bundle against what was stored when it was built."""
