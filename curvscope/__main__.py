"""`python -m curvscope`: the same as the `curvscope` command."""

from __future__ import annotations

from curvscope.cli.app import main

if __name__ == "__main__":
    main()
