"""One file per MoE layer with the inputs of the sampled tokens."""
