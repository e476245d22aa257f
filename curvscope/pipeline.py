"""`analyze`: the stages in order, from a checkpoint to a run."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from curvscope.assemble import Found, assembled
from curvscope.errors import AnalysisError, BatchError, DeviceError
from curvscope.extract.choose import DTYPES, budget
from curvscope.extract.cost import measured_rates
from curvscope.extract.footprint import release, returned_when_freed
from curvscope.extract.plan import size_in_words
from curvscope.extract.ready import describe_plan, get_ready
from curvscope.extract.sweep import Progress, no_progress
from curvscope.load import load_problem
from curvscope.load.decay import is_shampoo
from curvscope.load.problem import Problem
from curvscope.measure.effort import STABILITY_SHARE, stability_seconds
from curvscope.measure.layers import attempt, measure_layers, timed
from curvscope.measure.optimizer import SHAMPOO, damping_wishes
from curvscope.measure.series import kept_bytes
from curvscope.measure.spreads import Wanted
from curvscope.measure.stability_stage import Assessment, stability_stage
from curvscope.measure.stage import NetworkStage, no_tables, open_network
from curvscope.measure.wishes import Wishes, keep_nothing
from curvscope.planned import PlannedRun
from curvscope.run import Run
from curvscope.settings import Settings, checked_settings
from curvscope.units import parse_bytes

T = TypeVar("T")
WHOLE_MEMORY = "memory ran out in passes over the whole network, even over the smallest pieces of the data"


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
    example_index: str | int | None = None,
    seed: int = 0,
    dump: Sequence[str] | str = (),
    dataset_size: int | None = None,
    damping: float | None = None,
    scheduler: Any = None,
    clip_norm: float | None = None,
    batches: int | None = None,
    progress: bool | Progress = False,
) -> Run:
    """The curvature of every linear layer of a model on one batch, and how well K-FAC describes it.

    For each layer the K-FAC factors (expand and reduce), the exact GGN block (or an estimate of it), six
    approximations' errors against it, and spectra. Conventions and scales: `curvscope.records.CONVENTIONS`.

    Args:
        model: an nn.Module, or the path of a checkpoint (bundle, state_dict with `factory`, pickled module,
            torch.export archive, safetensors with `factory`, Hugging Face folder). It is never modified.
        batch: `(inputs, targets)`, a file, or None for a bundle's own; inputs a tensor, a tuple or a dict. Or several:
            a folder of files, a list of pairs, a DataLoader, or a callable that returns one pair or an iterable of
            them. The result is that of their concatenation, and memory does not grow with their number. All are read
            anew for every pass, and have to be the same then.
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
        measure: "spectral" for the relative spectral error of all approximations, "kron_best", "split" (what K-FAC's
            error comes from) and "damping" to compute them always, "steps" for damped steps of the whole network even
            where they take long, "stability" for sharpness by layer and on halves of the batch also where no optimizer
            is known.
        device: auto, cpu or cuda.
        dtype: float32 or float64 (or torch.float64 itself), the arithmetic of the network's passes; reductions run in
            float64 either way.
        memory: bound on the tool's own peak, bytes or "8GiB"; default half of what is free.
        time: seconds that `fisher="auto"` may spend on exact columns.
        example_axes: the example axis of an input (by keyword or position) where it is not axis 0.
        example_index: for a batch of graphs, the input (by keyword or position) that holds the number of its graph for
            every node. Without it a graph, known by its edge list, is one example.
        seed: of every random draw; the global random state is neither read nor changed.
        dump: "spectra" keeps eigenvectors, "columns" and "blocks" the matrices themselves.
        dataset_size: examples of the whole training set, which the evidence (and the weight decay it suggests) needs.
        damping: the damping that the optimizer uses, in the loss's own scale; None for the checkpoint's, if it has one.
        scheduler: the learning rate scheduler of a live `optimizer`; what it will do is judged, too.
        clip_norm: the bound that the training keeps on the gradient's norm; it comes before the checkpoint's, and 0
            says that there is none.
        batches: how many of several batches to take, from the first on; None for all. A source without a length that
            goes on after 1000 batches is refused without it.
        progress: True for lines on stderr, or a callable `(stage, item, done, total)`.

    Raises:
        CurvscopeError: everything that goes wrong on purpose; see `curvscope.errors`.

    Sources: K-FAC arXiv:1503.05671; expand and reduce arXiv:2311.00636; EKFAC arXiv:1806.03884.
    """
    run = _with_fallback(
        _given(
            model,
            batch,
            loss=loss,
            optimizer=optimizer,
            factory=factory,
            trust=trust,
            progress=progress,
            fisher=fisher,
            samples=samples,
            layers=layers,
            skip=skip,
            measure=measure,
            device=device,
            dtype=dtype,
            memory=memory,
            time=time,
            example_axes=example_axes,
            example_index=example_index,
            dataset_size=dataset_size,
            damping=damping,
            scheduler=scheduler,
            clip_norm=clip_norm,
            batches=batches,
            seed=seed,
            dump=dump,
        ),
        _analyzed,
    )
    run.sources = tuple(_file(given) for given in (model, batch))
    return run


def _file(given: Any) -> Path | None:
    """The file or folder that was given, if it was one, wherever the process goes later."""
    named = isinstance(given, (str, os.PathLike)) and os.path.exists(given)
    return Path(given).resolve() if named else None


def plan(model: Any, batch: Any = None, **options: Any) -> PlannedRun:
    """What `analyze` would do with the same arguments: passes, bytes, seconds, and every layer's treatment.

    The model is exported and verified, and a few passes are timed; the analysis itself does not run.

    Raises:
        CurvscopeError: as `analyze`, as far as it shows before the passes.
    """
    return _with_fallback(_given(model, batch, **options), _planned)


@dataclasses.dataclass(frozen=True)
class _Given:
    """The arguments, checked and loaded."""

    problem: Problem
    settings: Settings
    report: Progress
    seconds: dict[str, float]


def _given(
    model: Any,
    batch: Any,
    *,
    loss: Any = None,
    optimizer: Any = None,
    factory: Any = None,
    trust: bool = False,
    progress: bool | Progress = False,
    memory: int | str | None = None,
    time: float = 60.0,
    example_index: str | int | None = None,
    scheduler: Any = None,
    clip_norm: float | None = None,
    **options: Any,
) -> _Given:
    for name in ("layers", "skip", "measure", "dump"):
        options[name] = _words(options.get(name))
    options["example_axes"] = dict(options.get("example_axes") or {})
    defaults = {"fisher": "auto", "samples": None, "device": "auto", "dtype": "float32", "seed": 0}
    settings = checked_settings(
        **{**defaults, **options},
        memory_bytes=parse_bytes(memory) if isinstance(memory, str) else memory,
        time_seconds=time,
        example_index=None if example_index is None else str(example_index),
    )
    report = progress if callable(progress) else _print_progress if progress else no_progress
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        problem = load_problem(
            model,
            batch,
            loss,
            optimizer=optimizer,
            factory=factory,
            trust=trust,
            example_axes=settings.example_axes,
            example_index=settings.example_index,
            scheduler=scheduler,
            clip_norm=clip_norm,
            batches=settings.batches,
        )
    return _Given(*_one_damping(problem, settings), report, seconds)


def _one_damping(problem: Problem, settings: Settings) -> tuple[Problem, Settings]:
    """The optimizer's damping, wherever it was said, for the damping of layers and for the stability verdict alike."""
    options = problem.optimizer_options
    if settings.damping is None and "damping" in options:
        settings = dataclasses.replace(settings, damping=options["damping"])
    elif settings.damping is not None and options.get("kind") in ("kfac", "shampoo"):
        problem = dataclasses.replace(problem, optimizer_options={"damping": settings.damping, **options})
    return problem, settings


def _with_fallback(given: _Given, call: Callable[[_Given, torch.device], T]) -> T:
    """The call on the chosen device; where its memory runs out, on the CPU.

    Raises:
        AnalysisError: memory runs out there, too.
    """
    with returned_when_freed():
        return _on_any_device(given, call)


def _on_any_device(given: _Given, call: Callable[[_Given, torch.device], T]) -> T:
    device = _device(given.settings.device)
    tried = [device.type]
    if device.type != "cpu":
        found = attempt(lambda: call(given, device))
        if found is not None:
            return found
        tried.append("cpu")
        told = f"Memory ran out on {device.type}, even with one example at a time: this is what the CPU found."
        problem = dataclasses.replace(given.problem, notes=(*given.problem.notes, told))
        given = dataclasses.replace(given, problem=problem)
    found = attempt(lambda: call(given, torch.device("cpu")))
    if found is not None:
        return found
    raise AnalysisError(
        "There is not enough memory, even with one example at a time and without keeping columns.",
        where=f"tried on {', then on '.join(tried)}; --memory {size_in_words(budget(given.settings))}",
        remedy="Free some memory, analyze fewer layers with --layers, or give a batch of fewer or shorter examples. "
        "Nothing was measured, so nothing was written.",
    )


def _check_dataset(settings: Settings, examples: int) -> None:
    """Refuse a training set that is smaller than the batch taken from it."""
    if settings.dataset_size is not None and settings.dataset_size < examples:
        raise BatchError(
            f"The training set is said to have {settings.dataset_size} examples, and the batch has {examples}.",
            where="--dataset-size",
            remedy="Give the number of examples in the whole training set; with causal_lm and other sequences an "
            "example is a row of the batch, not a token.",
        )


def _planned(given: _Given, device: torch.device) -> PlannedRun:
    ready = get_ready(given.problem, given.settings, device, given.report, dict(given.seconds), kept_bytes)
    _check_dataset(given.settings, ready.passes.pieces.survey.examples)
    opened = attempt(partial(open_network, ready))
    if opened is None:
        return describe_plan(ready)
    # the whole network's stages
    ready, whole = opened
    planned = describe_plan(ready)
    known = ready.problem.optimizer is not None or bool(ready.problem.optimizer_options)
    rates = measured_rates(ready.device)
    more = {
        "steps": 0.0 if whole.why_no_steps else whole.steps_seconds,
        "stability": stability_seconds(whole.network, whole.effort, ready.settings, rates, known=known),
    }
    notes = [*planned.notes, *([f"No steps of the whole network: {whole.why_no_steps}."] if whole.why_no_steps else [])]
    return dataclasses.replace(planned, seconds={**planned.seconds, **more}, notes=notes)


def _analyzed(given: _Given, run_on: torch.device) -> Run:
    """The analysis on one device."""
    settings, report, seconds = given.settings, given.report, dict(given.seconds)
    ready = get_ready(given.problem, settings, run_on, report, seconds, kept_bytes)
    settings, problem, passes, notes = ready.settings, ready.problem, ready.passes, ready.notes
    graph, chosen = passes.graph, ready.fisher
    _check_dataset(settings, passes.pieces.survey.examples)
    stage = None
    with timed(seconds, "steps"):
        opened = attempt(partial(open_network, ready))
        release()
        if opened is not None:
            ready, whole = opened
            stage = attempt(partial(NetworkStage, whole, problem, settings, chosen))
    if is_shampoo(problem):
        notes.append(f"{SHAMPOO}.")
    wishes = Wishes(
        chosen,
        settings.measure,
        settings.dump,
        settings.seed,
        DTYPES[settings.dtype],
        ready.plan.piece_bytes,
        keep_nothing if stage is None else stage.keep,
        damping_wishes(problem.optimizer, graph, settings, shampoo=is_shampoo(problem)),
    )
    measured, squared_gradient = measure_layers(passes, ready.plan, wishes, report, seconds, ready.estimated)
    report("steps", "", 0, 1)
    with timed(seconds, "steps"):
        of_network = None if stage is None else attempt(partial(stage.tables, measured))
    report("steps", "", 1, 1)
    if of_network is None:
        of_network = no_tables(WHOLE_MEMORY, chosen, measured)
        notes.append(f"Tables steps and evidence are not assessed: {WHOLE_MEMORY}.")
    # what was kept of all layers for the steps
    del stage, wishes
    release()
    assessed = None
    if opened is not None:
        network, room = opened[1].network, opened[1].room
        report("stability", "", 0, 1)
        wanted = Wanted(
            seed=settings.seed,
            full="stability" in settings.measure,
            seconds=STABILITY_SHARE * settings.time_seconds,
            memory_bytes=budget(settings),
            basis_bytes=room.basis,
            together=room.together,
        )
        with timed(seconds, "stability"):
            assessed = attempt(partial(stability_stage, problem, network, measured, wanted))
        report("stability", "", 1, 1)
    if assessed is None:
        notes.append(f"Stability is not assessed: {WHOLE_MEMORY}.")
    found = Found(measured, squared_gradient**0.5, of_network, assessed or Assessment([]))
    return assembled(ready, found, seconds)


def _words(value: Sequence[str] | str | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


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
