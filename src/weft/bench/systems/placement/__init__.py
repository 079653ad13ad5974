"""Systems about where values live."""
