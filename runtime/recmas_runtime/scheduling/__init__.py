"""Runs that share engines: who computes, and which of their rows do so in one call."""
