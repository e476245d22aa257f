"""The `curvscope` command, as the console script and `python -m curvscope` start it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an interrupt ends it in one line, while its modules are still being imported, too."""
    try:
        from curvscope.cli.app import main as run

        run()
    except KeyboardInterrupt:
        from curvscope.errors import EXIT_INTERRUPTED

        print("error: Interrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
