"""A Ray cluster of all nodes of a Slurm allocation, for one run, ended with it."""
