"""What the config of a model says, read without transformers, and what its family fills in."""
