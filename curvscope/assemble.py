"""The run of an analysis: its records put together with the findings that follow from them."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from curvscope._version import __version__
from curvscope.diagnose import rules
from curvscope.extract.choose import DTYPES
from curvscope.extract.ready import Ready
from curvscope.graph.prepare import source_dtype
from curvscope.load.problem import Problem
from curvscope.measure.stability_stage import Assessment
from curvscope.records import CoverageRow, Layer, ModelInfo, RunInfo
from curvscope.run import Run


@dataclass(frozen=True)
class Found:
    """What the stages found: layers, the gradient's norm, the tables of steps and evidence, and stability."""

    layers: dict[str, Layer]
    gradient_norm: float
    of_network: Mapping[str, list[Any]]
    stability: Assessment


def assembled(ready: Ready, found: Found, seconds: dict[str, float]) -> Run:
    """The run; `seconds` gets the stage findings."""
    start = time.perf_counter()
    problem, settings, passes, layers, stability = (
        ready.problem,
        ready.settings,
        ready.passes,
        found.layers,
        found.stability,
    )
    table = [*stability.rows, *(row for layer in layers.values() for row in layer.signs)]
    coverage = [
        CoverageRow(use.parameter, use.layer, use.count, use.treatment, reason=use.reason) for use in passes.graph.uses
    ]
    info = _model_info(ready, found, coverage)
    findings = rules.find(info, layers, coverage, table, stability.examples, joint=found.of_network["global_damping"])
    notes = [*problem.notes, *ready.notes, *stability.notes, *_padding_note(layers)]
    seconds["findings"] = time.perf_counter() - start
    return Run(
        info=RunInfo(
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            curvscope_version=__version__,
            torch_version=torch.__version__,
            backpack_version=metadata.version("backpack-for-pytorch"),
            device=_device_words(ready.device),
            dtype=settings.dtype,
            seed=settings.seed,
            fisher=ready.fisher,
            samples=ready.samples if ready.fisher in ("probe", "mc") or ready.estimated else 0,
            source_dtype=source_dtype(problem, DTYPES[settings.dtype]),
        ),
        model=info,
        config=settings.as_dict(),
        layers=layers,
        tables={
            "layers": [layer.row for layer in layers.values()],
            "coverage": coverage,
            "errors": [row for layer in layers.values() for row in layer.errors.values()],
            "spectra": [row for layer in layers.values() for row in layer.spectra.values()],
            "damping": [row for layer in layers.values() for row in layer.damping],
            "ranges": [row for layer in layers.values() for row in layer.ranges],
            **found.of_network,
            "stability": table,
            "sources": [row for layer in layers.values() for row in layer.sources.values()],
            "examples": [*stability.examples, *(row for layer in layers.values() for row in layer.examples)],
            "findings": findings,
        },
        notes=notes,
        seconds=seconds,
    )


def _model_info(ready: Ready, found: Found, coverage: list[CoverageRow]) -> ModelInfo:
    problem = ready.problem
    trained = sum(row.count for row in coverage if row.treatment != "frozen")
    covered = sum(row.count for row in coverage if row.treatment == "kronecker")
    return ModelInfo(
        name=problem.name,
        checkpoint=problem.source,
        loss_name=problem.loss.label,
        loss=ready.passes.loss,
        gradient_norm=found.gradient_norm,
        parameters=sum(row.count for row in coverage),
        coverage=covered / trained if trained else 0.0,
        examples=ready.passes.pieces.survey.examples,
        outputs=str(ready.outputs),
        graph=ready.passes.graph.origin,
        mode_note=_mode_note(problem),
        step=-1 if problem.step is None else problem.step,
        optimizer=found.stability.optimizer,
        learning_rate=found.stability.learning_rate,
    )


def _device_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _mode_note(problem: Problem) -> str:
    """What eval mode hides, as a clause; empty where it hides nothing."""
    return " and ".join(problem.hidden_by_eval)


def _padding_note(layers: Mapping[str, Layer]) -> list[str]:
    """Says that rows were left out as padding: it changes factors that other tools count them in."""
    shares = [layer.row.padded for layer in layers.values() if layer.row.padded > 0]
    if not shares:
        return []
    return [
        f"Padding: up to {max(shares):.0%} of the rows of {len(shares)} layers belong to positions that no counted "
        "output depends on; they are left out of A and of R_n (column padded of the layers table)."
    ]
