"""Scores with a meaning: p-values, typicality, and log p by column."""
