"""Flows of other libraries as chains of our layers, with the same parameters. One module for each library."""
