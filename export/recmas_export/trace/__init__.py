"""What models are given while they are traced, in the places where transformers lets one."""
