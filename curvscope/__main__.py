"""The `curvscope` command, as the console script and `python -m curvscope` start it."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import NoReturn

from curvscope.errors import Terminated, ending


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it in one line, while its modules are still being imported, too."""
    try:
        # elsewhere than in the main thread there are no handlers; and who ignores the signal goes on doing so
        with contextlib.suppress(ValueError):
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, _terminate)
        from curvscope.cli.app import main as run

        run()
    except KeyboardInterrupt as stop:
        what, code = ending(stop)
        print(f"error: {what}", file=sys.stderr)
        sys.exit(code)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


if __name__ == "__main__":
    main()
