"""The exact block and its approximations, as objects with the same few operations."""
