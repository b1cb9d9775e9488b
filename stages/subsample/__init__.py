"""All experts evaluated on the sampled tokens: what they would do to each other's tokens."""
