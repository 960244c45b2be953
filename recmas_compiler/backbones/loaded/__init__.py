"""Facts of a loaded model that no config says: its head, its layers, names of its arguments."""
