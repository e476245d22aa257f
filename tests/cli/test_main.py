from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


TERMINATED = """
import sys, time
from curvscope.present.hdf5 import writer
from tests.synthetic import make_run
def stop(temporary, run):
    print("written", flush=True)
    time.sleep(60)
writer._check = stop
pipeline = type(sys)("curvscope.pipeline")
pipeline.analyze = lambda **arguments: make_run(layers=1)
sys.modules["curvscope.pipeline"] = pipeline
from curvscope.__main__ import main
sys.argv = ["curvscope", "analyze", "w.pt"]
main()
"""


def test_terminated_while_it_writes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", TERMINATED]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"written\n"
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
        process.terminate()
        process.wait()
        message = process.stderr.read().decode()
    assert process.returncode == 143
    assert message.startswith("error: Terminated.")
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []
