"""Plots of data and of what a flow has learned."""
