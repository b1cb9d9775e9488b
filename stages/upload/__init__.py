"""Sends the finished checkpoint to an object store, so that half of one is never taken for it."""
