"""What is run, in which order, and what is already done."""
