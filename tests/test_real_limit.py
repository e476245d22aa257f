"""Memory that really runs out: the process's own address space is limited, and what could be measured is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import curvscope

PROGRAM = """
import re, resource, sys
import torch
from torch import nn
import curvscope, curvscope.present.hdf5

def limit(mebibytes):
    size = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + mebibytes * 2**20, resource.RLIM_INFINITY))

def analyze(examples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 9))
    batch = torch.randn(examples, 4), torch.randint(9, (examples,))
    # so much that the plan leaves nothing out
    return curvscope.analyze(model, batch, loss="cross_entropy", fisher="exact", memory="8GiB")

analyze(8)
# the stack may still grow: where it can't, the kernel ends the process
limit(1)
try:
    analyze(400)
except curvscope.CurvscopeError as error:
    print("refused:", error.what)
limit(32)
analyze(128).save(sys.argv[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of the address space are Linux's")
def test_a_run_under_a_real_limit_is_saved_with_what_fits(tmp_path: Path) -> None:
    target = tmp_path / "run.h5"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(target)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "refused: There is not enough memory" in done.stdout
    run = curvscope.open(target)
    # min(P, N K) = 1152 for the middle layer alone
    assert run.layers["2"].row.status == "not_assessed"
    assert "memory ran out" in run.layers["2"].row.reason
    assert run.layers["2"].factors["expand"].A.shape == (51, 51)
    for name in ("0", "4"):
        assert run.layers[name].row.status == "ok"
        assert run.layers[name].errors["kfac_expand"].rel_frobenius > 0
