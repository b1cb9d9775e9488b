"""What the compression cost: perplexity and divergence on text that nothing was fitted to."""
