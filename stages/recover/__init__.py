"""Recovery: the compressed model learns to say what the original says (arXiv 2310.01334, 3.3)."""
