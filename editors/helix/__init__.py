"""Files that `albor setup` puts in place; no code."""
