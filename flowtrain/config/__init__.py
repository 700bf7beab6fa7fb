"""Configurations: their schema, their composition, what they build, and the run directories that keep them."""
