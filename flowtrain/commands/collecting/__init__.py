"""Gathers what a report shows of a flow and its data, within a budget of time: a module for each kind of material."""
