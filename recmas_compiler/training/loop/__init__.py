"""The training loop: steps, checkpoints, metrics, processes."""
