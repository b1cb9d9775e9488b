"""One observation, many (method, budget) pairs."""
