"""Files behind a URL of any protocol that fsspec has: listed, fetched once per node, sent."""
