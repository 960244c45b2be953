"""Sequences in the cache of a backbone while a plan runs, and snapshots of their layer states."""
