"""The command line `recmasc`, above compiler and export."""
