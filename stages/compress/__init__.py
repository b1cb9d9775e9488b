"""Low-rank plus sparse compression of the merged experts (MC-SMoE, after its equation 3)."""
