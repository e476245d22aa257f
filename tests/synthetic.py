"""A made-up but realistic run, for tests of what presents it: no torch, no analysis."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from curvscope.records import (
    NAN,
    CoverageRow,
    DampingRow,
    ErrorRow,
    EvidenceRow,
    ExampleRow,
    FindingRow,
    GlobalDampingRow,
    KroneckerFactors,
    Layer,
    LayerRow,
    ModelInfo,
    RangeRow,
    RunInfo,
    SourceRow,
    SpectrumRow,
    StabilityRow,
    StepRow,
)
from curvscope.run import Run
from curvscope.settings import APPROXIMATIONS, Settings

# name, kind, d_in, d_out, positions, padded, error of kfac_expand, of kfac_reduce (None: not assessed)
LAYERS: list[tuple[str, str, int, int, float, float, float | None, float | None]] = [
    ("stem.conv", "conv2d", 27, 8, 64.0, 0.0, 0.62, 0.418),
    ("transformer.blocks.0.attention.query_projection", "linear", 12, 12, 17.0, 0.0, 0.971, 0.352),
    ("transformer.blocks.0.attention.key_projection", "linear", 12, 12, 17.0, 0.0, 0.9871, 1.0),
    ("transformer.blocks.0.mlp/up", "linear", 12, 24, 12.6, 0.26, 0.4123, 0.4124),
    ("transformer.blocks.1.attention.query_projection", "linear", 12, 12, 17.0, 0.0, 0.884, 0.31),
    ("transformer.blocks.1.attention.key_projection", "linear", 12, 12, 17.0, 0.0, 0.903, 0.9998),
    ("100%weird/.name", "linear", 24, 12, 1.0, 0.0, 3.1e-9, 3.1e-9),
    ("wide", "linear", 40, 30, 1.0, 0.0, None, None),
    ("head", "linear", 12, 10, 1.0, 0.0, 0.1312, 0.1312),
]
EXAMPLES = 6
FORBIDDEN = "min(P, N K) = 1,230 is above 1,000 columns; estimate it with --fisher probe"
KRON_BEST = "would take 41 s of an analysis of 9 s; ask for it with --measure kron_best"


def _spectrum(rng: np.random.Generator, rank: int, decades: float) -> np.ndarray:
    values = 10.0 ** -(decades * np.linspace(0, 1, rank) ** 1.5) * np.exp(rng.normal(0, 0.05, rank))
    return np.sort(values)[::-1] * 0.37


def _spectrum_row(layer: str, name: str, values: np.ndarray) -> SpectrumRow:
    shares = values / values.sum()
    return SpectrumRow(
        layer=layer,
        approximation=name,
        trace=float(values.sum()),
        lambda_max=float(values[0]),
        lambda_min_positive=float(values[-1]),
        condition=float(values[0] / values[-1]),
        stable_rank=float((values**2).sum() / values[0] ** 2),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
    )


def _layer(rng: np.random.Generator, spec: tuple[Any, ...], fisher: str, dumped: bool) -> Layer:
    name, kind, d_in, d_out, positions, padded, expand, reduce = spec
    inputs, parameters = d_in + 1, (d_in + 1) * d_out
    assessed = expand is not None
    better = "" if not assessed or expand == reduce else "expand" if expand < reduce else "reduce"
    row = LayerRow(
        name, kind, d_in, d_out, True, 1, parameters, EXAMPLES, positions, EXAMPLES * 9, better, padded,
        status="ok" if assessed else "not_assessed", reason="" if assessed else FORBIDDEN,
    )  # fmt: skip
    factors = {}
    for flavour in ("expand", "reduce"):
        a, b = rng.normal(size=(inputs, inputs)), rng.normal(size=(d_out, d_out))
        factors[flavour] = KroneckerFactors(flavour, (a @ a.T).astype(np.float32), (b @ b.T).astype(np.float32))
    errors, spectra, spectrum = {}, {}, {}
    estimated = fisher == "probe"
    for position, approximation in enumerate(APPROXIMATIONS):
        known = {"kfac_expand": expand, "kfac_reduce": reduce}.get(
            approximation, (expand or 0) * (0.9 - 0.1 * position)
        )
        if not assessed:
            line = ErrorRow(name, approximation, fisher, status="not_assessed", reason=FORBIDDEN)
        elif approximation == "kron_best":
            line = ErrorRow(name, approximation, fisher, status="skipped", reason=KRON_BEST)
        else:
            line = ErrorRow(
                name, approximation, fisher,
                rel_frobenius=known, cosine=float(np.sqrt(max(0.0, 1 - min(known, 1.0) ** 2))),
                trace_ratio=1.0 if position > 1 else 1.0 - 0.3 * known,
                rel_frobenius_stderr=0.031 * known if estimated else NAN,
                trace_ratio_stderr=0.011 if estimated else NAN,
                rel_spectral=known * 1.1 if approximation.startswith("kfac") else NAN,
                status="estimated" if estimated else "ok",
            )  # fmt: skip
            spectrum[approximation] = _spectrum(rng, min(parameters, 80), 6 + 2 * known)
            spectra[approximation] = _spectrum_row(name, approximation, spectrum[approximation])
        errors[approximation] = line
    if assessed:
        spectrum["ggn"] = _spectrum(rng, EXAMPLES * 9, 3 + 3 * min(expand, 1.5))
        spectra["ggn"] = _spectrum_row(name, "ggn", spectrum["ggn"])
    else:
        spectra["ggn"] = SpectrumRow(name, "ggn", status="not_assessed", reason=FORBIDDEN)
    layer = Layer(row, factors, spectrum, errors, spectra)
    layer.attributes = {
        "expand/A/lambda_min": -1.3e-9, "expand/A/lambda_max": 31.5, "expand/B/lambda_min": 0.0,
        "expand/B/lambda_max": 2.5, "state": "converged", "eigensolver": "eigh float64",
    }  # fmt: skip
    layer.sources = {
        "kfac_expand": SourceRow(name, "kfac_expand", expand or NAN, 0.25, 0.15, 0.6),
        "kfac_reduce": SourceRow(name, "kfac_reduce", status="skipped", reason="too dear"),
    }
    layer.examples = [ExampleRow(name, 2, 0.55, NAN)]
    if dumped:
        layer.kept_columns = rng.normal(size=(EXAMPLES * 9, d_out, inputs)).astype(np.float32)
        matrix = layer.kept_columns.reshape(EXAMPLES * 9, -1)
        layer.block = matrix.T @ matrix
        layer.eigenvectors = {"ggn": rng.normal(size=(parameters, 5)), "expand/A": np.eye(inputs)}
    return layer


SERIES = [
    (name, form)
    for name in ("kfac_expand", "kfac_reduce", "ekfac_expand", "ggn")
    for form in ("eigenbasis", "factored")
    if form == "eigenbasis" or name.startswith("kfac")
]


def _steps() -> list[StepRow]:
    rows = []
    for index, (name, form) in enumerate(SERIES[:-1]):
        for decade in range(7):
            damping, actual = 10.0 ** (decade - 3), -0.03 / (1 + (decade - 4) ** 2) + 0.01 * (decade < 2)
            rho = 1.0 if decade > 3 else -0.3 * decade
            rows.append(
                StepRow(
                    name, form, damping, "current" if decade == 2 else "recommended" if decade == 4 else "grid",
                    damping / 0.011, NAN, actual * 1.1 + 0.001 * index, actual, rho, 3.1 / (1 + damping),
                    80.0 - 11 * decade, 0.5,
                    *((0.5, actual * 1.2, 0.31) if decade in (3, 4, 5) else (NAN, NAN, NAN)), passes=12,
                    reason="rho: the changes are within rounding of the loss" if decade == 6 else "",
                )
            )  # fmt: skip
    return [*rows, StepRow("ggn", "eigenbasis", NAN, "grid", status="not_assessed", reason=FORBIDDEN)]


def _summaries() -> list[GlobalDampingRow]:
    rows = [
        GlobalDampingRow(
            name, form, 10.0, 909.0, NAN, -0.03 - 0.001 * index, -0.033, 0.91, 10.0, 10.0, -0.03 - 0.001 * index, 0.91,
            10.0, 100.0, -0.039, -0.04, 1.03, 10.0, 0.04 / (0.03 + 0.001 * index) - 1, 0.1, 0.004, -0.6, 0.3,
            passes=70,
        )
        for index, (name, form) in enumerate(SERIES[:-1])
    ]  # fmt: skip
    return [*rows, GlobalDampingRow("ggn", "eigenbasis", status="not_assessed", reason=FORBIDDEN)]


def _evidence() -> list[EvidenceRow]:
    return [
        EvidenceRow(
            name, "grid" if decade else "maximum", 4.0 * 10.0**decade, -1178.1 - 700 * decade**2, 635.0 * 0.5**decade,
            0.0028 * 10.0**decade, 98.2, 1437.0, 7030, reason="3 terms an example, as in the batch",
        )
        for name in ("kfac_expand", "ekfac_reduce")
        for decade in range(-2, 3)
    ]  # fmt: skip


def _stability(made: list[Layer]) -> list[StabilityRow]:
    rule = "(2 + 2 beta1)/((1 - beta1) lr), arXiv:2207.14484"
    rows = [
        StabilityRow("network", "", "hessian_top", 52.1, 50.0, 60.2, residual=1e-3),
        StabilityRow("network", "", "ggn_top", 48.3, residual=1e-3),
        StabilityRow("network", "", "preconditioned_sharpness", 21000.0, 18100.0, 26000.0, 12667.0, "above", 2.0, rule),
        StabilityRow("network", "", "growth_factor", 2.9, 2.4, 3.8, 1.0, "above"),
        StabilityRow("network", "", "largest_stable_lr", 0.0018, 0.0015, 0.0021, 0.003, "above"),
    ]
    for number, layer in enumerate(made):
        rows.append(StabilityRow("layer", layer.name, "direction_share", 0.5 ** (number + 1)))
        values = (9000.0, 8000.0, 9500.0) if number else (16000.0, 14000.0, 17000.0)
        verdict = "below" if number else "above"
        rows.append(StabilityRow("layer", layer.name, "preconditioned_sharpness", *values, 12667.0, verdict, 0.1, rule))
    return rows


def damping_rows(layer: str, mistrust: float, current: float | None) -> tuple[list[DampingRow], list[RangeRow]]:
    """Steps of a made-up diagonal G with M = G / mistrust, in closed form, at the grid and the current value."""
    g = 10.0 ** -np.linspace(0, 4, 40)
    mean, rows, ranges = float(g.mean()), [], []
    places = sorted({10.0**e * mean for e in range(-8, 3)} | ({current} if current else set()))
    for name in ("kfac_expand", "kfac_reduce", "diag"):
        for form in ("eigenbasis", "factored") if name.startswith("kfac") else ("eigenbasis",):
            m, found = g / mistrust / (1.5 if form == "factored" else 1), []
            for place in places:
                p, x = g / (m + place), g / (g + place)
                decrease, best = g @ p - (g * p) @ p / 2, g @ x - (g * x) @ x / 2
                found.append(DampingRow(
                    layer, name, form, place, place / mean, "current" if place == current else "",
                    float(np.degrees(np.arccos(min(1.0, p @ x / np.linalg.norm(p) / np.linalg.norm(x))))),
                    float(np.linalg.norm(p) / np.linalg.norm(x)), float(decrease), float(decrease / best),
                    float(decrease / (g @ p - (m * p) @ p / 2)), float((m / (m + place)).sum()),
                    float(np.degrees(np.arccos(min(1.0, p @ g / np.linalg.norm(p) / np.linalg.norm(g))))),
                    float(np.linalg.norm(place * p - g) / np.linalg.norm(g)),
                    float(g @ p / (((g + place) * p) @ p)), 3.4 if place == current else NAN,
                ))  # fmt: skip
            top = max(range(len(found)), key=lambda i: found[i].predicted_decrease)
            marks = ", ".join(filter(None, (found[top].mark, "recommended")))
            found[top] = dataclasses.replace(found[top], mark=marks)
            rows += found
            low, high = 0.02 * mistrust * mean, 9.0 * mean
            standing = "" if not current else "too_small" if current < low else "safe"
            ranges.append(RangeRow(
                layer, name, form, current or NAN, low, high, found[top].damping, found[top].predicted_decrease,
                0.2 if current else NAN, NAN, standing, 0.1 if name != "diag" else NAN, found[top].damping * 10.0,
            ))  # fmt: skip
    return rows, ranges


def make_run(fisher: str = "exact", *, dumped: bool = False, findings: bool = True, layers: int | None = None) -> Run:
    """A run of nine layers: better and worse flavours, padding, a layer not assessed, odd names, NaNs."""
    rng = np.random.default_rng(0)
    made = [_layer(rng, spec, fisher, dumped) for spec in LAYERS[:layers]]
    for layer in made:
        if layer.row.status == "ok" and fisher == "exact":
            layer.damping, layer.ranges = damping_rows(layer.name, 1 + 9 * layer.row.padded, 0.03)
        else:
            layer.damping = [DampingRow(layer.name, "ggn", "eigenbasis", status="not_assessed", reason=FORBIDDEN)]
    coverage = [
        CoverageRow(f"{layer.name}.{part}", layer.name, count, "kronecker")
        for layer in made
        for part, count in (("weight", layer.row.d_in * layer.row.d_out), ("bias", layer.row.d_out))
    ]
    coverage += [
        CoverageRow(
            f"transformer.blocks.{i}.norm.{part}",
            "",
            12,
            "exact_only",
            reason="a norm has no Kronecker factors",
        )
        for i in range(2)
        for part in ("weight", "bias")
    ]
    coverage += [
        CoverageRow("position_table", "", 204, "uncovered", reason="its rows depend on no example"),
        CoverageRow("embed.parametrizations.weight.original1", "", 96, "uncovered", reason="the weight is computed"),
        CoverageRow("stem.scale", "", 8, "frozen", reason="requires_grad is False"),
    ]
    total = sum(row.count for row in coverage if row.treatment != "frozen")
    covered = sum(row.count for row in coverage if row.treatment == "kronecker")
    found = [
        FindingRow(
            code="CS201", severity="error", layer="transformer.blocks.0.attention.key_projection",
            title="K-FAC-reduce is blind", rank=1,
            evidence="K-FAC-reduce is blind here: its B is 0 while tr G = 0.61 (softmax ignores a shift of the keys), "
            "relative error 1.00.",
            remedy="Use expand for this layer, or leave it to the diagonal.",
        ),
        FindingRow(
            code="CS101", severity="warning", layer="transformer.blocks.0.attention.query_projection",
            rank=2, caused_by="CS201 transformer.blocks.0.attention.key_projection",
            evidence="K-FAC-expand is 0.97 off and K-FAC-reduce 0.35.", remedy="Choose kfac_approx='reduce' here.",
            confidence=0.9,
        ),
        FindingRow(
            code="CS001", severity="info", layer="", evidence="Dropout (p = 0.1) is off in eval mode.",
            remedy="Nothing to do.", rank=3,
        ),
        FindingRow(
            code="CS102", severity="info", layer="100%weird/.name", evidence="One position: K-FAC is exact.",
            remedy="Nothing to do.", rank=4,
        ),
    ]  # fmt: skip
    tables: dict[str, list[Any]] = {
        "layers": [layer.row for layer in made],
        "coverage": coverage,
        "errors": [row for layer in made for row in layer.errors.values()],
        "spectra": [row for layer in made for row in layer.spectra.values()],
        "damping": [row for layer in made for row in layer.damping],
        "ranges": [row for layer in made for row in layer.ranges],
        "steps": _steps(),
        "global_damping": _summaries(),
        "evidence": _evidence(),
        "stability": _stability(made),
        "sources": [row for layer in made for row in layer.sources.values()],
        "examples": [ExampleRow("", 3, 0.62, 0.41), *(row for layer in made for row in layer.examples)],
        "findings": [f for f in found if f.layer in ("", *(layer.name for layer in made))] if findings else [],
    }
    return Run(
        info=RunInfo(
            "2025-01-02T03:04:05+00:00", "0.1.0", "2.13.0", "1.7.1", "cpu", "float32", 0, fisher,
            8 if fisher == "probe" else 0,
        ),
        model=ModelInfo(
            name="VisionTransformer", checkpoint="runs/2025-01-02/digits_vit.pt",
            loss_name="cross_entropy(label_smoothing=0.1)", loss=0.6182736455, gradient_norm=0.0421,
            parameters=total, coverage=covered / total, examples=EXAMPLES, outputs="[6, 10]",
            mode_note="Dropout (p = 0.1) is off and BatchNorm uses its running statistics.", step=1200,
            optimizer="Adam, lr 0.003, beta1 0.9, beta2 0.999, eps 1e-08, step 1,200", learning_rate=0.003,
        ),
        config=dataclasses.asdict(Settings()),
        layers={layer.name: layer for layer in made},
        tables=tables,
        notes=["The prefix 'module.' was stripped from 24 keys."],
        seconds={"load": 0.12, "export": 1.91, "backward passes": 3.4, "measure": 4.25},
    )  # fmt: skip
