"""Systems about gradient exchange."""
