"""What learns: inner links, all links, or one agent's backbone to compare with."""
