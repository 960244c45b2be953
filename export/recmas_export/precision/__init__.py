"""Smaller weights: quantizing, rounding, and what that loses."""
