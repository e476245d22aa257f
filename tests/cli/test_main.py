from __future__ import annotations

import subprocess
import sys

import pytest


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "curvscope", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("curvscope ")


INTERRUPTED = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
sys.argv = ["curvscope", "analyze", "no.pt"]
from curvscope.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "curvscope.cli.export", "curvscope.present.kept"])
def test_an_interrupt_while_modules_are_imported_ends_in_a_line(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("error: Interrupted.")
    assert "Traceback" not in done.stderr
