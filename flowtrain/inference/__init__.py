"""Flows for inference from Python: fitted to arrays, tables and simulations, in the program that uses them."""
