"""What can be made again, kept on this machine: the store of builds and of loaded bundles."""
