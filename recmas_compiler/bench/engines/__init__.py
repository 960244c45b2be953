"""Latent steps of several engines, measured side by side."""
