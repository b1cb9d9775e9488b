"""A run as a Slurm job: its section of the config, the batch script, the submission."""
