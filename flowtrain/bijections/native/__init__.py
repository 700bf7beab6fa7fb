"""Layers' inner loops as C++ functions for the CPU.

Each has a counterpart of torch's operations, which computes the same numbers to rounding: for other devices, compiled
code, forward-mode derivatives, and derivatives of gradients.
"""
