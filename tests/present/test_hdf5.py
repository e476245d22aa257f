from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import curvscope
from curvscope.cli.app import app
from curvscope.errors import OutputError, UsageError
from curvscope.present.hdf5 import read, schema, write, writer
from curvscope.present.hdf5.sink import Sink
from curvscope.present.meanings import meaning
from curvscope.records import TABLES, FindingRow, KroneckerFactors
from curvscope.run import Run
from tests.synthetic import make_run


def same(a: object, b: object) -> bool:
    """Equal, with NaN equal to NaN and floats equal to the bit."""
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex() if not (math.isnan(a) and math.isnan(b)) else True
    return a == b and type(a) is type(b)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, Path]:
    run = make_run(dumped=True)
    return run, run.save(tmp_path / "run.h5")


@pytest.mark.parametrize("name", TABLES)
def test_tables_come_back_to_the_bit(saved: tuple[Run, Path], name: str) -> None:
    run, path = saved
    back = curvscope.open(path).tables[name]
    assert len(back) == len(run.tables[name]) > 0
    for before, after in zip(run.tables[name], back, strict=True):
        for field in dataclasses.fields(before):
            assert same(getattr(before, field.name), getattr(after, field.name)), (before, after)


def test_everything_else_comes_back(saved: tuple[Run, Path]) -> None:
    run, path = saved
    back = curvscope.open(path)
    assert back.info == run.info
    assert back.model == run.model
    assert back.config == json.loads(json.dumps(run.config))
    assert back.notes == run.notes
    assert back.seconds == run.seconds
    assert list(back.layers) == list(run.layers)
    assert back.coverage == run.coverage
    assert back.path == path


@pytest.mark.parametrize("name", ["stem.conv", "transformer.blocks.0.mlp/up", "100%weird/.name", "wide"])
def test_layers_come_back(saved: tuple[Run, Path], name: str) -> None:
    run, path = saved
    before, after = run.layers[name], curvscope.open(path).layers[name]
    assert after.name == name
    assert dict(after.attributes) == dict(before.attributes)
    assert repr(after.errors) == repr(before.errors)
    assert repr(after.spectra) == repr(before.spectra)
    assert set(after.factors) == set(before.factors)
    for flavour, factors in before.factors.items():
        for side in "AB":
            a, b = getattr(factors, side), getattr(after.factors[flavour], side)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
    for mapping in ("spectrum", "eigenvectors"):
        assert set(getattr(after, mapping)) == set(getattr(before, mapping))
        for key, values in getattr(before, mapping).items():
            assert np.array_equal(values, getattr(after, mapping)[key])
    assert np.array_equal(before.columns(), after.columns())
    assert before.block is not None
    assert after.block is not None
    assert np.array_equal(before.block, after.block)


def test_a_layer_without_columns_says_how_to_keep_them(tmp_path: Path) -> None:
    run = curvscope.open(make_run().save(tmp_path / "run.h5"))
    assert run.layers["head"].block is None
    with pytest.raises(UsageError, match="--dump columns"):
        run.layers["head"].columns()
    with pytest.raises(KeyError):
        run.layers["head"].factors["neither"]


def test_tied_roles_stand_below_their_flavour(tmp_path: Path) -> None:
    run = make_run(layers=1)
    layer = run.layers["stem.conv"]
    factors = layer.factors["expand"]
    layer.factors = {
        f"expand/{role}": KroneckerFactors("expand", factors.A * scale, factors.B, role)
        for role, scale in (("embedding", 1), ("he/ad", 2))
    }
    layer.attributes = {"expand/he/ad/A/lambda_max": 3.5}
    path = run.save(tmp_path / "run.h5")
    with h5py.File(path) as file:
        group = file["layers/stem.conv/factors/expand"]
        assert set(group) == {"embedding", "he%2Fad"}
        assert group["he%2Fad/A"].attrs["lambda_max"] == 3.5
    back = curvscope.open(path).layers["stem.conv"]
    assert set(back.factors) == {"expand/embedding", "expand/he/ad"}
    assert back.factors["expand/he/ad"].role == "he/ad"
    assert np.array_equal(back.factors["expand/he/ad"].A, 2 * factors.A)
    assert dict(back.attributes) == {"expand/he/ad/A/lambda_max": 3.5}


def test_the_file_follows_the_schema(saved: tuple[Run, Path]) -> None:
    run, path = saved
    with h5py.File(path) as file:
        assert file.attrs["format"] == "curvscope-run"
        assert file.attrs["schema_version"] == "1.0"
        assert bool(file.attrs["complete"])
        assert json.loads(file["config"].asstr()[()])["fisher"] == "auto"
        assert file["model"].attrs["loss"] == run.model.loss
        for name, row in TABLES.items():
            table = file[f"tables/{name}"]
            assert list(table.dtype.names) == [field.name for field in dataclasses.fields(row)]
            assert all(table.attrs[f"meaning_{column}"] for column in table.dtype.names)
        group = file["layers/transformer.blocks.0.mlp%2Fup"]
        assert group.attrs["name"] == "transformer.blocks.0.mlp/up"
        assert group.attrs["padded"] == 0.26
        assert "100%25weird%2F.name" in file["layers"]
        factor = group["factors/expand/A"]
        stored = run.layers["transformer.blocks.0.mlp/up"].factors["expand"].A
        assert factor.attrs["trace"] == pytest.approx(np.trace(stored.astype(np.float64)), rel=1e-12)
        assert factor.attrs["lambda_min"] == -1.3e-9
        assert "sum_{n,r} a a^T" in factor.attrs["convention"]
        assert factor.chunks is None
        large = file["layers/wide/block"]
        assert large.chunks is not None
        assert (large.compression, large.shuffle, large.fletcher32) == ("gzip", True, True)


@pytest.mark.parametrize(
    ("values", "trace"),
    [
        pytest.param(np.array([1.0, 2.0, 4.0]), 7.0, id="diagonal"),
        pytest.param(np.stack([np.eye(2), 3 * np.eye(2)]), 8.0, id="groups"),
        pytest.param(np.zeros((0, 0)), 0.0, id="empty"),
        pytest.param(np.float16([[2.0]]), 2.0, id="half"),
    ],
)
def test_factors_of_other_shapes(tmp_path: Path, values: np.ndarray, trace: float) -> None:
    run = make_run(layers=1)
    run.layers["stem.conv"].factors = {"expand": KroneckerFactors("expand", values, values)}
    path = run.save(tmp_path / "run.h5")
    with h5py.File(path) as file:
        assert file["layers/stem.conv/factors/expand/A"].attrs["trace"] == trace
    back = curvscope.open(path).layers["stem.conv"].factors["expand"].A
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)


def test_every_column_has_a_meaning() -> None:
    for name, row in TABLES.items():
        for field in dataclasses.fields(row):
            assert meaning(name, field.name), f"{name}.{field.name}"


def test_names_that_hdf5_can_not_hold(tmp_path: Path) -> None:
    run = make_run(layers=1)
    run.model = dataclasses.replace(run.model, checkpoint="odd\udcff\0name.pt")
    assert curvscope.open(run.save(tmp_path / "run.h5")).model.checkpoint == "odd\ufffd\ufffdname.pt"


def _no_format(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = 1


def _set(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value

    return change


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def _without(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda path: path.unlink(), "no such file", id="missing"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "folder", id="folder"),
        pytest.param(_cut(0), "not an HDF5 file", id="empty"),
        pytest.param(lambda path: path.write_text("layer,error\n"), "not an HDF5 file", id="text"),
        pytest.param(_cut(0.5), "damaged", id="half"),
        pytest.param(_cut(0.99), "damaged", id="nearly whole"),
        pytest.param(_no_format, "not a curvscope run", id="other HDF5"),
        pytest.param(_set("format", "keras"), "not a curvscope run", id="other format"),
        pytest.param(_set("schema_version", "2.0"), "schema 2.0; this curvscope reads 1.x", id="next major"),
        pytest.param(_set("complete", False), "unfinished", id="unfinished"),
        pytest.param(_without("config"), "damaged", id="no config"),
        pytest.param(_without("layers"), "damaged", id="no layers"),
        *(pytest.param(_without(f"tables/{name}"), "damaged", id=f"no table of {name}") for name in TABLES),
        pytest.param(_without("tables"), "damaged", id="no tables"),
        pytest.param(_without("model"), "damaged", id="no model"),
        pytest.param(_set("device", "abacus"), "checksum of the attributes", id="another device"),
    ],
)
def test_unreadable_files_are_refused_in_words(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    path = make_run(layers=2).save(tmp_path / "run.h5")
    damage(path)
    with pytest.raises(OutputError, match=words) as caught:
        read(path)
    assert caught.value.exit_code == 3
    assert str(path) in caught.value.where
    assert caught.value.remedy


def test_a_flipped_bit_is_noticed(saved: tuple[Run, Path]) -> None:
    _, path = saved
    with h5py.File(path) as file:
        offset = file["layers/wide/block"].id.get_chunk_info(0).byte_offset + 100
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    layer = curvscope.open(path).layers["wide"]
    assert layer.factors["expand"].A.shape == (41, 41)
    with pytest.raises(OutputError, match="damaged"):
        _ = layer.block


def test_overwritten_bytes_are_told_or_do_not_matter(tmp_path: Path) -> None:
    """Whatever is overwritten, `show` says so with exit code 3, or shows what was written."""
    path = make_run(layers=2).save(tmp_path / "run.h5")
    content = path.read_bytes()

    def shown(layer: list[str]) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["show", str(path), *layer])
        assert done.exit_code in (0, 3), (done.exit_code, done.output)
        assert done.exit_code == 0 or (done.stdout == "" and done.stderr.startswith("error: ")), done.output
        return done.exit_code, done.stdout

    pages: list[list[str]] = [[], ["stem.conv"]]
    sound = [shown(layer) for layer in pages]
    told = 0
    for offset in range(0, len(content) - 64, len(content) // 12):
        for filling in (b"\xff", b"\0"):
            path.write_bytes(content[:offset] + filling * 64 + content[offset + 64 :])
            for layer, whole in zip(pages, sound, strict=True):
                code, text = shown(layer)
                told += code == 3
                assert code == 3 or text == whole[1], (offset, filling)
    assert told > 9


def test_a_heap_without_end_is_told(tmp_path: Path) -> None:
    """The HDF5 library itself would read it for ever."""
    path = make_run(layers=1).save(tmp_path / "run.h5")
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 64 : heap + 256] = bytes(192)
    path.write_bytes(content)
    with pytest.raises(OutputError, match="damaged"):
        read(path)


def test_a_later_minor_version_is_read(tmp_path: Path) -> None:
    path = make_run(layers=1).save(tmp_path / "run.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = "1.7"
        file.attrs["novelty"] = 1
        file["tables/novel"] = np.zeros(3)
        del file["tables/findings"]
        kept = [(name, h5py.string_dtype()) for name in ("code", "severity", "layer", "evidence", "remedy")]
        rows = [("CS1", "info", "", "a", "b", 0.5)]
        file["tables/findings"] = np.array(rows, dtype=[*kept, ("novel", "<f8")])
        file["tables/findings"].attrs["values_crc32"] = schema.checksum(file["tables/findings"][()])
    run = curvscope.open(path)
    assert run.findings == [FindingRow(code="CS1", severity="info", layer="", evidence="a", remedy="b", confidence=1.0)]


def test_what_was_opened_outlives_its_replacement(saved: tuple[Run, Path]) -> None:
    run, path = saved
    back = curvscope.open(path)
    write(make_run(layers=1), path, force=True)
    assert np.array_equal(back.layers["head"].columns(), run.layers["head"].columns())
    back.save(path, force=True)
    assert len(curvscope.open(path).layers) == len(run.layers)


CHILD = """
import os, signal, sys, time
# under nohup the interrupt would be ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from curvscope.present.hdf5 import writer
from tests.synthetic import make_run
def stop(temporary, run):
    print("written", flush=True)
    time.sleep(60)
writer._check = stop
make_run(dumped=True).save(sys.argv[1], force=True)
"""


@pytest.mark.parametrize("previous", [True, False], ids=["over a previous file", "fresh"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way(tmp_path: Path, previous: bool, blow: signal.Signals) -> None:
    path = tmp_path / "run.h5"
    if previous:
        make_run(layers=2).save(path)
    before = path.read_bytes() if previous else None
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        child.send_signal(blow)
        child.wait()
    assert (path.read_bytes() if path.exists() else None) == before
    left = [file for file in tmp_path.iterdir() if file != path]
    assert len(left) == (1 if blow == signal.SIGKILL else 0)
    # What a kill leaves is hidden, and in nobody's way.
    assert all(file.name.startswith(".run.h5.") for file in left)
    make_run(layers=1).save(path, force=previous)


def test_an_interrupt_while_hdf5_writes_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Sink):
        def close(self) -> None:
            super().close()
            self._failure = KeyboardInterrupt()

    monkeypatch.setattr(writer, "Sink", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_run(layers=1).save(tmp_path / "run.h5")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from curvscope.errors import OutputError
from tests.synthetic import make_run
run = make_run(dumped=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save(sys.argv[1], force=True)
except OutputError as error:
    print(error.exit_code)
"""


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = make_run(layers=1).save(tmp_path / "run.h5")
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == "3", done.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_file_can_be_opened_by_others_meanwhile(tmp_path: Path, ours_first: bool) -> None:
    path = tmp_path / "run.h5"
    write(make_run(), path)
    run = read(path) if ours_first else None
    with h5py.File(path) as file:
        run = run or read(path)
        assert len(file["tables/errors"]) == len(run.tables["errors"])


def test_a_lock_of_another_process_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "run.h5"
    write(make_run(), path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read(path).layers
