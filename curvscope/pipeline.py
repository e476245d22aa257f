"""`analyze`: the stages in order, from a checkpoint to a run."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import sys
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from curvscope._version import __version__
from curvscope.diagnose import rules
from curvscope.errors import CurvscopeError, DeviceError, UsageError
from curvscope.extract.choose import DTYPES, PROBES, choose, estimate_plan, make_plan
from curvscope.extract.collector import Extract, Form
from curvscope.extract.plan import Plan
from curvscope.extract.positionwise import independent_positions, shared_note
from curvscope.extract.roots import Root, make_root
from curvscope.extract.sweep import Progress, no_progress, sweep
from curvscope.graph.eager import build_eager
from curvscope.graph.export import ExportFailure, FlatInputs, example_axes_of, export_model, flatten_inputs
from curvscope.graph.functional import Graph, build
from curvscope.graph.shadow import moved, shadow
from curvscope.graph.trial import refused, try_forward
from curvscope.graph.verify import Layouts, verify
from curvscope.load import check_targets, load_problem
from curvscope.load.problem import Problem
from curvscope.measure.layer import Wishes, measure_layer
from curvscope.measure.stability_stage import Wanted, stability_stage
from curvscope.records import CoverageRow, Layer, ModelInfo, RunInfo
from curvscope.run import Run
from curvscope.settings import DUMPS, FISHERS, MEASURES, Settings
from curvscope.units import parse_bytes

# What the stability measures may take of --time.
STABILITY_SHARE = 0.25


def analyze(
    model: Any,
    batch: Any = None,
    *,
    loss: Any = None,
    optimizer: Any = None,
    factory: str | Callable[..., nn.Module] | None = None,
    trust: bool = False,
    fisher: str = "auto",
    samples: int | None = None,
    layers: Sequence[str] | str | None = None,
    skip: Sequence[str] | str | None = None,
    measure: Sequence[str] | str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    memory: int | str | None = None,
    time: float = 60.0,
    example_axes: Mapping[str, int] | None = None,
    seed: int = 0,
    dump: Sequence[str] | str = (),
    progress: bool | Progress = False,
) -> Run:
    """The curvature of every linear layer of a model on one batch, and how well K-FAC describes it.

    For each layer the K-FAC factors (expand and reduce), the exact GGN block (or an estimate of it), six
    approximations' errors against it, and spectra. Conventions and scales: `curvscope.records.CONVENTIONS`.

    Args:
        model: an nn.Module, or the path of a checkpoint (bundle, state_dict with `factory`, pickled module,
            torch.export archive, safetensors with `factory`, Hugging Face folder). It is never modified.
        batch: `(inputs, targets)`, a file, or None for a bundle's own; inputs a tensor, a tuple or a dict.
        loss: "cross_entropy", "mse", "bce_with_logits" or "causal_lm" (settings after a colon, such as
            "cross_entropy:class_axis=last"), a torch loss module, or a callable `(outputs, targets) -> scalar`; None
            for a bundle's own.
        optimizer: the torch.optim optimizer that trains the model, for the stability verdict; or words such as
            "sgd:lr=0.1,momentum=0.9" or a mapping with the same keys, which come before the checkpoint's own state
            (kinds: sgd, adam, adamw, nadam, rmsprop, adagrad, kfac, shampoo).
        factory: builds the nn.Module that a state_dict or safetensors file belongs to.
        trust: allow checkpoint formats that can run code when loaded.
        fisher: exact; probe or mc (`samples` draws, with standard errors); empirical; auto is exact for every layer for
            which the estimated time stays under `time` seconds, the bytes under `memory`, and min(P, N K) <= 8192.
        samples: draws of probe and mc (default 8; error bars take 4, EKFAC's 6).
        layers, skip: globs of layer names to keep, to leave out.
        measure: "spectral" for the relative spectral error of all approximations, "kron_best" and "split" (what K-FAC's
            error comes from) to compute them always, "stability" for sharpness by layer and on halves of the batch also
            where no optimizer is known.
        device: auto, cpu or cuda.
        dtype: float32 or float64, the arithmetic of the network's passes; reductions run in float64 either way.
        memory: bound on the tool's own peak, bytes or "8GiB"; default half of what is free.
        time: seconds that `fisher="auto"` may spend on exact columns.
        example_axes: the example axis of an input (by keyword or position) where it is not axis 0.
        seed: of every random draw; the global random state is neither read nor changed.
        dump: "spectra" keeps eigenvectors, "columns" and "blocks" the matrices themselves.
        progress: True for lines on stderr, or a callable `(stage, item, done, total)`.

    Raises:
        CurvscopeError: everything that goes wrong on purpose; see `curvscope.errors`.

    Sources: K-FAC arXiv:1503.05671; expand and reduce arXiv:2311.00636; EKFAC arXiv:1806.03884.
    """
    settings = _settings(
        fisher=fisher,
        samples=samples,
        layers=_words(layers),
        skip=_words(skip),
        measure=_words(measure),
        device=device,
        dtype=dtype,
        memory_bytes=parse_bytes(memory) if isinstance(memory, str) else memory,
        time_seconds=time,
        seed=seed,
        dump=_words(dump),
        example_axes=dict(example_axes or {}),
    )
    report = progress if callable(progress) else _print_progress if progress else no_progress
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        problem = load_problem(
            model,
            batch,
            loss,
            optimizer=optimizer,
            factory=factory,
            trust=trust,
            example_axes=settings.example_axes,
        )
    run_on = _device(settings.device)
    kind = DTYPES[settings.dtype]
    report("export", problem.name, 0, 1)
    with _timed(seconds, "export"):
        graph, flat, axes, examples, notes = _graph(problem, settings, run_on, kind)
    report("export", problem.name, 1, 1)
    tensors = [moved(tensor, run_on, kind) for tensor in flat.tensors]
    targets = moved(problem.targets, run_on, kind)
    with _timed(seconds, "layout"):
        layouts = _verified(graph, flat, tensors, axes, examples)
        # the loss with its class axis settled
        problem = dataclasses.replace(problem, loss=check_targets(problem.loss, layouts.outputs, targets))
    if settings.fisher in ("auto", "exact"):
        with _timed(seconds, "positions"):
            apart = independent_positions(problem.loss, graph, tensors, layouts, targets)
            layouts = dataclasses.replace(layouts, independent=apart)
    chosen, reason, estimated = choose(problem, graph, layouts, targets, settings, seconds["layout"] / 3)
    samples_taken = settings.samples or PROBES
    make = functools.partial(
        make_root,
        problem.loss,
        layouts.outputs,
        targets,
        layouts.output,
        samples=samples_taken,
        seed=settings.seed,
    )
    root = make(fisher=chosen, independent=layouts.independent)
    if root.shared and layouts.independent is not None:
        notes.append(shared_note(layouts.independent))
    if reason:
        notes.append(reason)
    plan = make_plan(graph, layouts, root, settings, estimated)
    wishes = Wishes(chosen, settings.measure, settings.dump, settings.seed, kind)
    probes = make(fisher="probe") if estimated else None
    draws = None if probes is None else (probes, estimate_plan(graph, layouts, probes, settings, estimated))
    measured, squared_gradient = _measure(graph, tensors, layouts, root, plan, draws, wishes, report, seconds)
    with _timed(seconds, "gradient"):
        squared_gradient += sum(float(g.double().square().sum()) for g in graph.rest(tensors, root.gradient).values())
    with _timed(seconds, "stability"):
        stability = stability_stage(
            problem,
            graph,
            tensors,
            targets,
            axes,
            layouts.output,
            layouts.outputs,
            measured,
            squared_gradient**0.5,
            Wanted(
                seed=settings.seed,
                full="stability" in settings.measure,
                seconds=STABILITY_SHARE * settings.time_seconds,
            ),
        )
        notes += stability.notes
    table = [*stability.rows, *(row for layer in measured.values() for row in layer.signs)]
    with _timed(seconds, "findings"):
        coverage = [
            CoverageRow(use.parameter, use.layer, use.count, use.treatment, reason=use.reason) for use in graph.uses
        ]
        trained = sum(row.count for row in coverage if row.treatment != "frozen")
        covered = sum(row.count for row in coverage if row.treatment == "kronecker")
        info = ModelInfo(
            name=problem.name,
            checkpoint=problem.source,
            loss_name=problem.loss.label,
            loss=root.loss,
            gradient_norm=squared_gradient**0.5,
            parameters=sum(row.count for row in coverage),
            coverage=covered / trained if trained else 0.0,
            examples=examples,
            outputs=str(list(layouts.outputs.shape)),
            graph=graph.origin,
            mode_note=_mode_note(problem),
            step=-1 if problem.step is None else problem.step,
            optimizer=stability.optimizer,
            learning_rate=stability.learning_rate,
        )
        findings = rules.find(info, measured, coverage, table, stability.examples)
        notes += _padding_note(measured)
    return Run(
        info=RunInfo(
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            curvscope_version=__version__,
            torch_version=torch.__version__,
            backpack_version=metadata.version("backpack-for-pytorch"),
            device=_device_words(run_on),
            dtype=settings.dtype,
            seed=settings.seed,
            fisher=chosen,
            samples=samples_taken if chosen in ("probe", "mc") or estimated else 0,
        ),
        model=info,
        config=settings.as_dict(),
        layers=measured,
        tables={
            "layers": [layer.row for layer in measured.values()],
            "coverage": coverage,
            "errors": [row for layer in measured.values() for row in layer.errors.values()],
            "spectra": [row for layer in measured.values() for row in layer.spectra.values()],
            "stability": table,
            "sources": [row for layer in measured.values() for row in layer.sources.values()],
            "examples": [*stability.examples, *(row for layer in measured.values() for row in layer.examples)],
            "findings": findings,
        },
        notes=[*problem.notes, *notes],
        seconds=seconds,
    )


def _measure(
    graph: Graph,
    tensors: Sequence[Tensor],
    layouts: Layouts,
    root: Root,
    plan: Plan,
    draws: tuple[Root, Plan] | None,
    wishes: Wishes,
    report: Progress,
    seconds: dict[str, float],
) -> tuple[dict[str, Layer], float]:
    """Every chosen layer's record, in forward order, and the squared norm of all layers' gradient.

    The layers of the plan of `draws` get their columns from sweeps over that root: blocks estimated, factors exact.
    """
    names = [spec.name for spec in graph.chosen()]
    first: dict[str, Extract] = {}
    measured: dict[str, Layer] = {}
    squared = 0.0
    sweeps = [(number, group, root, plan) for number, group in enumerate(plan.groups)]
    if draws is not None:
        sweeps += [(number, group, *draws) for number, group in enumerate(draws[1].groups, start=1)]
    for number, group, source, of in sweeps:
        forms: dict[str, Form | None] = {name: of.layers[name].form for name in group}
        with _timed(seconds, "passes"):
            if number == 0:
                later: dict[str, Form | None] = {name: None for name in names if name not in forms}
                extracts = sweep(
                    graph,
                    tensors,
                    layouts,
                    root,
                    forms | later,
                    per_draw=wishes.fisher in ("probe", "mc"),
                    gradient_only=[name for name in graph.layers if name not in names],
                    progress=report,
                )
                for extract in extracts.values():
                    if extract.gradient is not None:
                        squared += float(extract.gradient.double().square().sum())
                first = {name: extracts[name] for name in later}
            else:
                more = sweep(graph, tensors, layouts, source, forms, factors=False, progress=report)
                extracts = {
                    name: dataclasses.replace(first.pop(name), columns=extract.columns)
                    for name, extract in more.items()
                }
        wish = dataclasses.replace(wishes, fisher=source.fisher)
        for name in group:
            if draws is not None and source is root and name in draws[1].layers:
                first[name] = extracts.pop(name)
                continue
            report("measure", name, len(measured), len(names))
            with _timed(seconds, "measure"):
                # popped: its columns are gone before the next layer's are worked on
                measured[name] = measure_layer(extracts.pop(name), wish, why_no_columns=of.layers[name].reason)
    report("measure", "", len(names), len(names))
    return {name: measured[name] for name in names}, squared


def _settings(**given: Any) -> Settings:
    """The settings, each checked against what exists.

    Raises:
        UsageError: a value that is not among the choices.
    """
    for key, choices in (("fisher", FISHERS), ("dtype", tuple(DTYPES)), ("device", ("auto", "cpu", "cuda"))):
        if given[key] not in choices:
            raise UsageError(
                f"{given[key]!r} is no choice for {key}.",
                where=f"--{key}",
                remedy=f"Choose one of {', '.join(choices)}.",
            )
    for key, choices in (("measure", MEASURES), ("dump", DUMPS)):
        for value in given[key]:
            if value not in choices:
                raise UsageError(
                    f"{value!r} is no choice for {key}.",
                    where=f"--{key}",
                    remedy=f"Choose from {', '.join(choices)}.",
                )
    if not isinstance(given["seed"], int) or not 0 <= given["seed"] < 2**63:
        raise UsageError("seed must be a whole number from 0 to 2^63 - 1.", where="--seed", remedy="Choose another.")
    if given["samples"] is not None and given["samples"] < 1:
        raise UsageError("samples must be at least 1.", where="--samples", remedy="Leave it out for the default.")
    if given["memory_bytes"] is not None and given["memory_bytes"] <= 0:
        raise UsageError("memory must be positive.", where="--memory", remedy="Write bytes, or words such as 8GiB.")
    return Settings(**given)


def _words(value: Sequence[str] | str | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall-clock seconds of the block to a stage."""
    start = clock.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + clock.perf_counter() - start


def _print_progress(stage: str, item: str, done: int, total: int) -> None:
    print(f"{stage}: {item} ({done} of {total})", file=sys.stderr)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "CUDA was asked for, and torch sees no CUDA device.",
            where=f"--device cuda; torch {torch.__version__}",
            remedy="Use --device cpu or auto, or install a CUDA build of torch with a driver that matches it.",
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _device_words(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _graph(
    problem: Problem, settings: Settings, device: torch.device, dtype: torch.dtype
) -> tuple[Graph, FlatInputs, tuple[int | None, ...], int, list[str]]:
    """The functional graph (or the eager fallback), its inputs, their example axes, N, and notes."""
    flat = flatten_inputs(problem.inputs)
    axes, examples = example_axes_of(flat.names, flat.tensors, problem.example_axes)
    options: dict[str, Any] = {"layers": settings.layers, "skip": settings.skip}
    notes = _precision_notes(problem, dtype)
    if not isinstance(problem.model, nn.Module):
        graph = build(
            problem.model,
            device=device,
            dtype=dtype,
            dynamic=bool(problem.model.range_constraints),
            **options,
        )
        return graph, flat, axes, examples, notes
    twin = shadow(problem.model, device=device, dtype=dtype)
    tensors = tuple(moved(tensor, device, dtype) for tensor in flat.tensors)
    try_forward(twin, flat, tensors)
    try:
        exported = export_model(problem.model, problem.inputs, problem.example_axes, device=device, dtype=dtype)
    except ExportFailure as failure:
        graph = build_eager(twin, flat, tensors, str(failure), **options)
        notes.append(f"torch.export refused the model, so only its own linear modules are seen: {failure}")
        return graph, flat, axes, examples, notes
    graph = build(exported.program, device=device, dtype=dtype, dynamic=exported.dynamic, **options)
    return graph, flat, axes, examples, [*notes, *exported.notes]


def _precision_notes(problem: Problem, dtype: torch.dtype) -> list[str]:
    """Says so where the checkpoint's own precision is not the run's."""
    kinds = {p.dtype for p in problem.model.parameters() if p.is_floating_point()}
    low = sorted(str(kind).removeprefix("torch.") for kind in kinds if torch.finfo(kind).bits < 32)
    wanted = str(dtype).removeprefix("torch.")
    return [f"Weights stored as {', '.join(low)} are computed in {wanted}."] if low else []


def _verified(
    graph: Graph, flat: FlatInputs, tensors: Sequence[Tensor], axes: Sequence[int | None], examples: int
) -> Layouts:
    """The layouts; a failure of the pass itself is told as a refusal of the batch."""
    try:
        return verify(graph, tensors, axes, examples)
    except CurvscopeError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise refused(error, flat) from error


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
