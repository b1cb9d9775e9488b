"""Decides which experts stay, merge or go: pure functions of the statistics table."""
