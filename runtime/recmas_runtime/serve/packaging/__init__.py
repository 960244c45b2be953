"""A bundle as a container: image, metrics beside it, and a manifest for clusters."""
