"""Patterns: macros that expand to agents and links."""
