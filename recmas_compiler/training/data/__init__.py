"""What training reads: records, and hidden states over their target texts."""
