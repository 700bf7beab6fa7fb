"""The sections of a run's report: each a function that adds blocks to a page."""
