"""A checkpoint run one decoder layer at a time: depth costs time, not memory."""
