"""Where the damage sits: one layer alone is compressed, and the final logits are compared."""
