"""Routing statistics: additive, exact, and the same for any sharding."""
