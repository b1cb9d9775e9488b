"""The `mapped` checkpoint format: original router, merged experts, and a map between the two."""
