"""The language: every section and key, as types."""
