"""Flows for inference from Python: fitted to arrays and tables, in the program that uses them."""
