"""What builds have made, kept for other builds: the store, its settings, the parts of a build."""
