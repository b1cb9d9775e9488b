"""UNCURL (arXiv 2409.01483) in miniature: how far models of 8, 16 and 32 experts can be reduced."""
