"""Running a service: its address, its models as they come and go, what it tells of itself."""
