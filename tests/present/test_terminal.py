from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

import curvscope
from curvscope.errors import UsageError
from curvscope.present.terminal import render
from curvscope.records import CoverageRow, ErrorRow, FindingRow, Layer, LayerRow, Run
from curvscope.settings import APPROXIMATIONS
from tests.synthetic import FORBIDDEN, KRON_BEST, LAYERS, make_run

NAMES = [spec[0] for spec in LAYERS]


def page(run: Run, layer: str | None = None, *, width: int = 140, path: str | None = "run.h5", **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    render(run, console, layer, path)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """The overview's table: first word of each line to the words of it."""
    lines = text[text.index("layers, in") :].splitlines()
    body = lines[next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"}) + 1 :]
    return {line.split()[0]: line.split() for line in body[: len(LAYERS)]}


@pytest.mark.parametrize("fisher", ["exact", "probe"])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 220])
@pytest.mark.parametrize("layer", [None, "transformer.blocks.0.mlp/up", "wide"])
def test_nothing_is_wider_than_the_terminal(fisher: str, width: int, layer: str | None) -> None:
    text = page(make_run(fisher), layer, width=width)
    for line in text.splitlines():
        if "curvscope show" not in line and "curvscope export" not in line:
            assert cell_len(line) <= width, line


@pytest.mark.parametrize("width", [40, 80, 140])
def test_one_line_a_layer(width: int) -> None:
    table = rows(page(make_run(), width=width))
    assert len(table) == len(LAYERS)
    for name in ("stem.conv", "head"):
        assert any(word.startswith("0.") for word in table[name])


def test_wide_report_has_every_column() -> None:
    run = make_run()
    text = page(run)
    table = rows(text)
    assert table["stem.conv"][:9] == [
        "stem.conv", "conv2d", "8×27", "64", "0.620", "0.418*", "0.814", "0.875", "78,900"
    ]  # fmt: skip
    assert set(table["stem.conv"][9]) <= set("▁▂▃▄▅▆▇█")
    assert table["transformer.blocks.0.attention.key_projection"][4:6] == ["0.987*", "1.00"]
    assert table["wide"][4:] == ["–"] * 6
    assert all(name in text for name in NAMES)


def test_narrow_report_keeps_what_matters() -> None:
    table = rows(page(make_run(), width=80))
    assert table["stem.conv"][:6] == ["stem.conv", "8×27", "64", "0.620", "0.418*", "78,900"]
    assert "…0.attention.key_projection" in table


@pytest.mark.parametrize(
    "words",
    [
        "89.0 % Kronecker, 1.5 % exact block only, 9.5 % not covered (of the trainable parameters)",
        "VisionTransformer, 3,168 parameters, step 1,200",
        "0.6183 cross_entropy(label_smoothing=0.1), gradient norm 0.0421",
        "exact GGN (8 layers), 1 layer not assessed, float32 on cpu",
        "eval mode: Dropout",
        "digits_vit.pt",
        f"skipped: kron_best of 8 layers: {KRON_BEST}",
        f"not assessed: everything of wide: {FORBIDDEN}",
        "not covered: position_table (its rows depend on no example)",
        "exact block only: transformer.blocks.0.norm.weight, transformer.blocks.0.norm.bias and 2 more",
        "frozen: stem.scale",
        "K-FAC-reduce is blind here",
        "→ Use expand for this layer",
        "causes CS101 in transformer.blocks.0.attention.query_projection",
        "Worth knowing, on the layers' pages: CS102 (1 layer).",
        "The prefix 'module.' was stripped",
        "export 1.9 s",
        "curvscope show run.h5 transformer.blocks.0.attention.key_projection",
    ],
)
def test_overview_says(words: str) -> None:
    assert words in page(make_run(), width=200)


def test_estimates_carry_their_error() -> None:
    run = make_run("probe")
    wide, narrow = page(run, width=140), page(run, width=80)
    assert "GGN estimated from 8 probes" in wide
    for text in (wide, narrow):
        assert "0.62±.02" in text
        assert "± estimated" in text
    assert all(len(line) <= 80 for line in narrow.splitlines())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fisher": "empirical"}, "empirical Fisher, which is another matrix than the GGN"),
        ({"fisher": "mc", "samples": 1}, "GGN estimated from 1 drawn label an example"),
        ({"fisher": "mc", "samples": 4}, "GGN estimated from 4 drawn labels an example"),
    ],
)
def test_the_header_names_the_fisher(change: dict[str, Any], words: str) -> None:
    run = make_run()
    run.info = dataclasses.replace(run.info, **change)
    for layer in run.layers.values():
        layer.errors = {k: dataclasses.replace(e, fisher=change["fisher"]) for k, e in layer.errors.items()}
    assert words in page(run)


def test_many_reasons_do_not_make_many_lines() -> None:
    run = make_run()
    run.tables["errors"] = [
        dataclasses.replace(row, reason=f"would take {i} s") if row.status == "skipped" else row
        for i, row in enumerate(run.tables["errors"])
    ]
    text = page(run, width=200)
    assert text.count("skipped:") == 1
    assert "other reasons: 7" in text


def test_without_findings() -> None:
    assert "nothing stands out" in page(make_run(findings=False))


def test_an_empty_run_is_a_page_too() -> None:
    run = make_run(layers=0)
    run.tables = {name: [] for name in run.tables}
    assert "0 layers" in page(run)


@pytest.mark.parametrize(
    "words",
    [
        "ERROR",
        "linear, 12×12 with bias, 156 parameters",
        "6 examples, 17 positions each, 54 GGN columns",
        "kfac_expand*       0.987   0.160  0.704      1.09  exact",
        "kron_best              –       –      –         –  skipped",
        f"kron_best skipped: {KRON_BEST}",
        "1e0 ┤•",
        "filled: the block of the GGN; • kfac_expand, which has 26 more nonzero eigenvalues",
        "expand A  13×13 float32     31.5   -1.3e-9",
        "eigensolver: eigh float64",
        "curvscope export run.h5 --to npz",
    ],
)
def test_layer_page_says(words: str) -> None:
    assert words in page(make_run(), "transformer.blocks.0.attention.key_projection", width=200)


def test_layer_page_of_what_was_not_assessed() -> None:
    text = page(make_run(), "wide", width=200)
    assert f"all not assessed: {FORBIDDEN}" in text
    assert "┤" not in text


def test_layer_page_tells_of_padding_and_kept_arrays() -> None:
    text = page(make_run(dumped=True), "transformer.blocks.0.mlp/up", width=200)
    assert "26.0 % of the rows are padding" in text
    assert "also kept: columns, block, eigenvectors" in text


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("nothing_like_it", "There is no layer 'nothing_like_it'"),
        ("blocks", "5 layers have 'blocks' in their names"),
        ("haed", "head"),
    ],
)
def test_a_layer_that_is_not_there(wanted: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        page(make_run(), wanted)
    assert caught.value.exit_code == 2


def test_a_part_of_a_name_is_enough() -> None:
    run = make_run()
    assert page(run, "mlp") == page(run, "transformer.blocks.0.mlp/up")


@pytest.mark.parametrize("layer", [None, *NAMES])
@pytest.mark.parametrize("fisher", ["exact", "probe"])
def test_the_file_shows_the_same(tmp_path: Path, layer: str | None, fisher: str) -> None:
    run = make_run(fisher, dumped=True)
    back = curvscope.open(run.save(tmp_path / "run.h5"))
    assert page(back, layer) == page(run, layer)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("layer", [None, "transformer.blocks.0.mlp/up"])
def test_plain_encodings(encoding: str, layer: str | None) -> None:
    run = make_run("probe")
    run.tables["findings"][0] = dataclasses.replace(run.tables["findings"][0], evidence="4×4 → ‖G‖ 日本")
    raw = io.BytesIO()
    for width in (80, 140):
        stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        render(run, Console(file=stream, width=width), layer, "rün.h5")
        stream.detach()
    text = raw.getvalue().decode("ascii")
    assert "0.41+-.01" in text
    assert layer or "4x4 -> \\u2016G\\u2016" in text


def test_control_characters_do_not_reach_the_terminal() -> None:
    run = make_run(layers=1)
    evil = "stem\x1b[2J\nconv\x07\u202e"
    layer = run.layers.pop("stem.conv")
    layer.row = dataclasses.replace(layer.row, name=evil, reason=evil)
    run.layers[evil] = layer
    run.tables["findings"][0] = dataclasses.replace(run.tables["findings"][0], layer=evil, evidence=evil)
    run.model = dataclasses.replace(run.model, name=evil, checkpoint=evil, mode_note=evil)
    for text in (page(run), page(run, evil), page(run, path=None)):
        assert "stem\\x1b[2J" in text
        assert not set("\x1b\x07\u202e") & set(text)


def test_colours_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    assert "\x1b[" not in page(run)
    assert "\x1b[1;31m" in page(run, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = page(run, force_terminal=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_names_are_not_markup() -> None:
    run = make_run(layers=1)
    run.notes = ["[bold]kept[/] as it is [/nothing]"]
    assert "[bold]kept[/] as it is [/nothing]" in page(run)


def test_show_prints_to_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    run.show("head")
    assert "run.layers['head']" not in capsys.readouterr().err
    stream = io.StringIO()
    run.show(file=stream)
    assert 'run.save("run.h5")' in stream.getvalue()
    run.save(tmp_path / "run.h5")
    run.show(file=stream)
    assert "curvscope show" in stream.getvalue()


def test_to_pandas() -> None:
    pytest.importorskip("pandas")
    run = make_run()
    frame = run.to_pandas("errors")
    assert list(frame.columns)[:4] == ["layer", "approximation", "fisher", "rel_frobenius"]
    assert frame.rel_frobenius[0] == run.tables["errors"][0].rel_frobenius
    assert np.isnan(frame.rel_frobenius_stderr).all()
    run.tables["errors"] = []
    assert list(run.to_pandas("errors").columns) == list(frame.columns)
    with pytest.raises(UsageError, match="no table 'error'"):
        run.to_pandas("error")


def with_blocks_alone(run: Run) -> Run:
    """The run with five norms and a table of positions, which have no Kronecker factors."""
    norms = [f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)] + ["norm"]
    for name, kind, size in [*((norm, "layer_norm", 20) for norm in norms), ("positions", "shift", 300)]:
        row = LayerRow(name, kind, size, 1, False, 1, size, 6, 1.0, 54, "")
        reason = "no Kronecker form: element by element"
        errors = {a: ErrorRow(name, a, "exact", status="not_assessed", reason=reason) for a in APPROXIMATIONS}
        errors["diag"] = ErrorRow(name, "diag", "exact", rel_frobenius=0.5)
        run.layers[name] = Layer(row, errors=errors)
        run.tables["errors"] += errors.values()
        run.tables["layers"].append(row)
        run.tables["coverage"].append(CoverageRow(name, name, size, "exact_only"))
    return run


def test_layers_with_a_block_alone_stand_together() -> None:
    text = page(with_blocks_alone(make_run()), width=200)
    assert "9 layers, in forward order" in text
    assert "exact block only: positions (8.4 %), 5 norms blocks.*.norm*, norm (2.8 %)" in text
    assert "no Kronecker form" not in text
    assert "exact GGN (8 layers), 1 layer not assessed" in text
    alone = page(with_blocks_alone(make_run()), "blocks.0.norm1", width=200)
    assert "layer_norm, exact block only, 20 parameters" in alone
    assert "no Kronecker form" in alone
    assert "arrays" not in alone


@pytest.mark.parametrize(("name", "words"), [("norm", "norm"), ("blocks.0.ln", "norm blocks.0.ln")])
def test_one_norm_with_a_block_alone(name: str, words: str) -> None:
    run = make_run()
    run.layers[name] = Layer(LayerRow(name, "layer_norm", 3, 1, False, 1, 3, 6, 1.0, 54, ""))
    run.tables["layers"].append(run.layers[name].row)
    run.tables["coverage"].append(CoverageRow(name, name, 3, "exact_only"))
    assert f"exact block only: {words} (" in page(run, width=200)


def test_groups_stand_in_the_shape() -> None:
    run = make_run()
    layer = run.layers["stem.conv"]
    layer.row = dataclasses.replace(layer.row, groups=4)
    text = page(run)
    assert rows(text)["stem.conv"][2] == "4·2×27"
    assert "4·2×27: 4 groups of 2×27 each." in text


def test_the_layer_page_has_standard_errors_at_any_width() -> None:
    text = page(make_run("probe"), "stem.conv", width=80)
    assert "0.62±.02" in text
    assert "~0.785" in text  # the cosine, estimated without one


@pytest.mark.parametrize("findings", [True, False])
def test_little_is_known_where_most_was_not_assessed(findings: bool) -> None:
    run = make_run(findings=findings)
    for layer in list(run.layers.values())[:5]:
        layer.errors = {k: ErrorRow(layer.name, k, "exact", status="not_assessed") for k in layer.errors}
    text = page(run, width=200)
    assert "nothing stands out" not in text
    assert "not assessed for 6 of 9 layers" in text


def test_every_finding_of_the_network_is_printed() -> None:
    run = make_run()
    network = [
        FindingRow(code=f"CS30{i}", severity=severity, layer="", evidence=f"Of the network, {i}.", remedy="")
        for i, severity in enumerate(("warning", "info", "warning", "info"))
    ]
    run.tables["findings"] = [*run.findings, *network]
    text = page(run, width=200)
    assert all(row.evidence in text for row in network)
    assert "no warnings" not in text


@pytest.mark.parametrize(
    ("count", "words"), [(4, "and 1 warning more, on the page of its layer."), (6, "3 warnings more")]
)
def test_three_roots_are_shown(count: int, words: str) -> None:
    run = make_run()
    run.tables["findings"] = [
        FindingRow(code="CS202", severity="warning", layer=name, evidence=f"Units of {name}.", remedy="", rank=i)
        for i, name in enumerate(NAMES[:count])
    ]
    text = page(run, width=200)
    assert [f"Units of {name}." in text for name in NAMES[:count]] == [True] * 3 + [False] * (count - 3)
    assert words in text


def test_a_quiet_run_says_so() -> None:
    run = make_run()
    run.tables["findings"] = [row for row in run.findings if row.severity == "info"]
    text = page(run, width=200)
    assert "no warnings" in text
    assert "what deserves a look" not in text


def test_the_layer_page_names_causes_and_sources() -> None:
    text = page(make_run(), "transformer.blocks.0.attention.query_projection", width=200)
    assert "likely caused by CS201 transformer.blocks.0.attention.key_projection" in text
    assert (
        "kfac_expand's error comes from: deviation from the inputs' mean 25%, the mean 15%, positions adding up 60%"
        in text
    )
    assert "kfac_reduce's error comes from: skipped, too dear" in text


def test_one_position_has_no_better_flavour() -> None:
    run = make_run()
    layer = run.layers["head"]
    layer.row = dataclasses.replace(layer.row, better_flavour="same")
    text = page(run, "head", width=200)
    assert "expand and reduce are the same (one position)" in text
    assert "K-FAC-same" not in text
    assert "• kfac_expand" in text


def test_the_mode_is_said_once() -> None:
    run = make_run()
    run.model = dataclasses.replace(run.model, mode_note="dropout is off")
    assert "eval mode: dropout is off " in page(run)
