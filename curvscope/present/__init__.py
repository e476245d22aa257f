"""Presenting a run: terminal, HDF5, JSON and exports. They format what a run holds and compute nothing."""
