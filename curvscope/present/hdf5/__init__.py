"""The run as an HDF5 file, schema 1.0: `write` and `read`, and nothing else, open such files."""

from curvscope.present.hdf5.earlier import check_target
from curvscope.present.hdf5.reader import read
from curvscope.present.hdf5.writer import write

__all__ = ["check_target", "read", "write"]
