"""Running a plan: records in, answers out."""
