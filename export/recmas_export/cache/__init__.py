"""What builds have made, kept for other builds: the parts of a build and what they depend on."""
