"""What learns: inner links, all links, or one agent to compare with."""
