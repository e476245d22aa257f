"""The run as an HDF5 file, schema 1.0: `write` and `read`, and nothing else, open such files."""

from curvscope.present.hdf5.reader import read
from curvscope.present.hdf5.writer import write

__all__ = ["read", "write"]
