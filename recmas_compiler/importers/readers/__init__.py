"""One reader per form of team file: `read(path)` returns a `Team`."""
