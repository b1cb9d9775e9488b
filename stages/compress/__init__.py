"""Low-rank plus sparse compression of the merged experts (MC-SMoE section 3.3)."""
