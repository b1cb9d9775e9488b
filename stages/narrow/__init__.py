"""Narrower experts: which neurons stay, and what their down projections become."""
