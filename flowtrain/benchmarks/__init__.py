"""Side by side with other people's code: what ``flowtrain bench`` measures. Each suite is a module with ``rows``."""

SUITES = {  # name -> module
    "train": "training_steps",
    "sample": "sampling",
    "spline": "splines",
    "memory": "peak_memory",
    "data": "data_loading",
    "start": "start_up",
}
