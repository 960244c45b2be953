"""What is known of a program without running it: memory, text, drawings."""
