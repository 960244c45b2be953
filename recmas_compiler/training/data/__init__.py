"""What training reads: examples, their order, kept hidden states."""
