"""Data that a user's simulator makes: its prior, its simulations, and where they are kept."""
