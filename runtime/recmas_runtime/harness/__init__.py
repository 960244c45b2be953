"""Systems as models of evaluation harnesses: lm-evaluation-harness and Inspect."""
