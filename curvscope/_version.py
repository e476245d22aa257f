"""The one place that states curvscope's version."""

__version__ = "0.1.0"
