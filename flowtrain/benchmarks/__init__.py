"""Side by side with other people's code: what ``flowtrain bench`` measures. Each suite is a module with ``rows``."""

SUITES = ("train", "sample", "spline", "memory", "data", "start")
