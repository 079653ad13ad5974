"""Catalogue entries of memory: one file per published system."""
