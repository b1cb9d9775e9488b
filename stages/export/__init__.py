"""Writes a checkpoint that opens: formats, assembly and the reload gate."""
