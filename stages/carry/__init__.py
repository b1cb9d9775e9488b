"""Residual streams of the original and of the reduced model, carried from layer to layer."""
