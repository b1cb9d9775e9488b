"""Merging the aligned experts of a group."""
