"""The tables of arXiv 2310.01334 at small scale: full, pruned, averaged, merged, decomposed."""
