"""Bringing a model's files together: from the Hugging Face hub, from packages that hold parts."""
