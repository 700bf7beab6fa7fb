"""Networks' inner loops as C++ functions for the CPU; see :mod:`flowtrain.bijections.native`."""
