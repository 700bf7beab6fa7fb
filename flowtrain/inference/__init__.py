"""Flows for inference, from Python."""
