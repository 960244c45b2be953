"""A bundle's folder: how it is written, and what it carries beside its engines."""
