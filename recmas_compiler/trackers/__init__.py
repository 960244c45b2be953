"""Trackers of experiments: where trainings and evaluations write their figures besides files."""
