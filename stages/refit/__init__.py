"""Solves the down projections again, so that a reduced layer does what the original one did."""
