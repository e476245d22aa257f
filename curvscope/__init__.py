"""A debugger for curvature."""
from curvscope._version import __version__ as __version__
