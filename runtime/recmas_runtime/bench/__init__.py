"""Measuring systems against each other: time, tokens and speed-up in one run."""
