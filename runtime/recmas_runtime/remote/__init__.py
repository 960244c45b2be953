"""Models behind an API: what stands in the place of an engine for agents that only speak text."""
