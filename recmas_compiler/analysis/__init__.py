"""What can be told of a program without running it: memory, text, drawings."""
