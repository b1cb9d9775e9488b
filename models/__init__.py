"""What a checkpoint is: families, lazy reading, atomic writing, the compressed model's code."""
