"""Numbers about blocks and approximations, as plain records."""
