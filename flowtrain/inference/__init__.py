"""Flows for inference: fitting them to arrays, and scores with a meaning."""
