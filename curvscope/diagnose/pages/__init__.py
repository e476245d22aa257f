"""The pages of all codes, a file a family."""
