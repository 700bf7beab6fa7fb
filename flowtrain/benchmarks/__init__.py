"""The suites of ``flowtrain bench``, which compares flowtrain with other libraries. Each is a module with ``rows``."""

SUITES = {  # name -> module
    "train": "training_steps",
    "sample": "sampling",
    "decode": "decoding",
    "spline": "splines",
    "memory": "peak_memory",
    "serve": "serving",
    "data": "data_loading",
    "epoch": "epochs",
    "processes": "processes",
    "start": "start_up",
    "commands": "command_speed",
}
