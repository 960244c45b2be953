"""Checks of a whole spec that need no weights."""
