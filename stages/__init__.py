"""What is computed: every stage has a Config, plan, run_one, reduce, and knows nothing of Ray."""
