"""Systems as a service: what asks them, what runs them, and how the two speak."""
