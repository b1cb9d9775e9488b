"""One decoder layer at a time: align, merge, and write the finished tensors."""
