"""Recovery: the compressed model is trained to say what the original says (arXiv 2310.01334, 3.3)."""
