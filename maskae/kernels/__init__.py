"""Kernels, each with a plain JAX twin of the same values and gradients."""
