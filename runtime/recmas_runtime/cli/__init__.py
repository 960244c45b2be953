"""The command line `recmas`."""
