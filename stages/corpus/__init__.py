"""Text to token blocks: a mixture of domains, read by `datasets`, packed or padded."""
