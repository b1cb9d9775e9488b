"""Permutation alignment of experts before they are merged."""
