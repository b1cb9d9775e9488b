"""Reads every weight file once, before anything is spent on it."""
