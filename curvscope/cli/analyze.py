"""`curvscope analyze`: from a checkpoint and a batch to a report and a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from curvscope.cli import optimizers, options
from curvscope.cli.guard import Output, guarded
from curvscope.cli.quantities import example_axis, memory_bytes, one_of, seconds
from curvscope.errors import EXIT_FINDINGS
from curvscope.planned import PlannedRun
from curvscope.records import Run
from curvscope.settings import DUMPS, FISHERS, MEASURES

INPUT = "Input"
CURVATURE = "Curvature"
RESOURCES = "Resources"
SEVERITIES = ("info", "warning", "error")


def analyze(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A bundle, state_dict, pickled module, torch.export archive, safetensors file or Hugging Face folder.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="pkg.module:factory",
            help="Makes the model that the weights belong to.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|pkg.module:callable",
            help="Inputs and targets: .pt, .npz, .h5 or .safetensors, a folder of such files (many batches), or a "
            "callable that returns one pair or an iterable of them.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="K",
            help="Take the first K of several batches (default: all; a source without a length may have 1000).",
            rich_help_panel=INPUT,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="The loss as trained: cross_entropy, mse, bce_with_logits or causal_lm, with settings "
            "(:label_smoothing=0.1), or pkg.module:callable.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    example_axes: Annotated[
        list[str] | None,
        typer.Option(
            "--example-axis",
            metavar="NAME=AXIS",
            help="The axis of an input that counts the examples, where it is not the first.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    example_index: Annotated[
        str | None,
        typer.Option(
            "--example-index",
            metavar="NAME",
            help="In a batch of graphs, the input that holds the number of its graph for every node.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="Load files that can run code of their own.", rich_help_panel=INPUT),
    ] = False,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Only layers whose names match; may be repeated.",
            rich_help_panel=CURVATURE,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No layers whose names match; may be repeated.", rich_help_panel=CURVATURE),
    ] = None,
    fisher: Annotated[
        str,
        typer.Option(
            parser=one_of(FISHERS),
            metavar="NAME",
            help="How the loss Hessian's root is taken: exact, probe, mc or empirical; auto is exact for "
            "the layers that time and memory allow, probe for the others.",
            rich_help_panel=CURVATURE,
        ),
    ] = "auto",
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Draws of probe and mc (8).", rich_help_panel=CURVATURE),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            parser=one_of(MEASURES),
            metavar="NAME",
            help="What to measure although it is left out by default: spectral (relative spectral error of "
            "all approximations), kron_best, split and damping (also where they take longest), steps (of the whole "
            "network, also where they take long), stability (by layer and on halves also without an optimizer); "
            "may be repeated.",
            rich_help_panel=CURVATURE,
        ),
    ] = None,
    dataset_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Examples of the whole training set: for the evidence and the weight decay it suggests.",
            rich_help_panel=CURVATURE,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            parser=one_of(("auto", "cpu", "cuda")),
            metavar="auto|cpu|cuda",
            help="Where to run.",
            rich_help_panel=RESOURCES,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            parser=one_of(("float32", "float64")),
            metavar="float32|float64",
            help="Arithmetic of the network's own passes.",
            rich_help_panel=RESOURCES,
        ),
    ] = "float32",
    memory: Annotated[
        int | None,
        typer.Option(
            parser=memory_bytes,
            metavar="SIZE",
            help="Bound on the tool's own memory, e.g. 8GiB (default: half of what is free).",
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    time: Annotated[
        float,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="What fisher auto may spend, e.g. 2min.",
            rich_help_panel=RESOURCES,
        ),
    ] = "60s",  # type: ignore[assignment]
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seeds every random draw.", rich_help_panel=RESOURCES)
    ] = 0,
    dump: Annotated[
        list[str] | None,
        typer.Option(
            parser=one_of(DUMPS),
            metavar="NAME",
            help="What to store: factors (always, and the eigenvalues), spectra (the eigenvectors, too), columns, "
            "blocks; may be repeated.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="RUN.h5",
            help="Where to write (default: CHECKPOINT's stem with .curvscope.h5, here).",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    force: options.Force = False,
    optimizer: optimizers.Optimizer = None,
    lr: optimizers.LearningRate = None,
    momentum: optimizers.Momentum = None,
    nesterov: optimizers.Nesterov = None,
    beta1: optimizers.Beta1 = None,
    beta2: optimizers.Beta2 = None,
    eps: optimizers.Eps = None,
    weight_decay: optimizers.WeightDecay = None,
    clip_norm: optimizers.ClipNorm = None,
    damping: optimizers.Damping = None,
    format: options.Format = "table",
    fail_on: Annotated[
        str | None,
        typer.Option(
            parser=one_of(SEVERITIES),
            metavar="|".join(SEVERITIES),
            help="Exit with 1 if there is a finding of this severity or above.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan (passes, bytes, seconds, each layer's treatment) and stop.",
            rich_help_panel=RESOURCES,
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress bars and no report.", rich_help_panel=options.OUTPUT),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Compare K-FAC with the exact curvature of every linear layer.

    For example

        curvscope analyze sample_models/digits_vit.pt

        curvscope analyze weights.pt --model mynet:build --batch batch.npz --loss cross_entropy
    """
    axes = dict(example_axis(words) for words in example_axes or ())
    with guarded(debug):
        from curvscope.present import hdf5
        from curvscope.present.kept import check_kept, check_no_batch

        target = output or default_output(checkpoint)
        if not dry_run:
            check_kept(target, (checkpoint, batch))
            check_no_batch(target, batch)
            hdf5.check_target(target, force)
        messages = Output(stderr=True)
        # A model's own prints must not get between the parts of the JSON document.
        own_prints = contextlib.redirect_stdout(sys.stderr) if format == "json" else contextlib.nullcontext()
        with own_prints:
            found = _run(
                messages,
                quiet,
                dry_run,
                model=checkpoint,
                batch=batch,
                batches=batches,
                loss=loss,
                factory=model,
                trust=trust,
                optimizer=optimizers.given(
                    optimizer,
                    lr=lr,
                    momentum=momentum,
                    nesterov=nesterov,
                    beta1=beta1,
                    beta2=beta2,
                    eps=eps,
                    weight_decay=weight_decay,
                ),
                fisher=fisher,
                samples=samples,
                layers=layers or None,
                skip=skip or None,
                measure=measure or None,
                device=device,
                dtype=dtype,
                memory=memory,
                time=time,
                example_axes=axes or None,
                example_index=example_index,
                seed=seed,
                dump=tuple(dump or ()),
                dataset_size=dataset_size,
                damping=damping,
                clip_norm=clip_norm,
            )
        if dry_run:
            _print_plan(found, format)
            return
        run: Run = found
        hdf5.write(run, target, force=force)
        _report(run, target, messages, format=format, quiet=quiet)
        if fail_on is not None and failing(run, fail_on):
            raise typer.Exit(EXIT_FINDINGS)


def default_output(checkpoint: str) -> Path:
    """`<checkpoint stem>.curvscope.h5` in the current folder."""
    return Path(f"{Path(checkpoint).resolve().stem}.curvscope.h5")


def failing(run: Run, severity: str) -> bool:
    """Whether the run has a finding of this severity or above."""
    bad = SEVERITIES[SEVERITIES.index(severity) :]
    return any(row.severity in bad for row in run.findings)


def _print_plan(planned: PlannedRun, format: str) -> None:
    """The plan on stdout."""
    if format == "json":
        import json

        from curvscope.cli.show import print_document

        print_document(Output(), json.dumps(planned.as_dict(), indent=2))
        return
    from curvscope.present.terminal.plan import render_plan

    render_plan(planned, Output())


def _run(messages: Output, quiet: bool, dry_run: bool, **arguments: Any) -> Any:
    """The analysis, with progress bars, or the plan of it."""
    from curvscope.cli.progress import ProgressBars

    loading = messages.status("loading torch") if messages.is_terminal and not quiet else contextlib.nullcontext()
    call: Callable[..., Any]
    with loading:
        if dry_run:
            from curvscope.pipeline import plan

            call = plan
        else:
            from curvscope.pipeline import analyze as run_analysis

            call = run_analysis
    with ProgressBars(messages, quiet=quiet) as bars:
        return call(**arguments, progress=bars)


def _report(run: Run, target: Path, messages: Output, *, format: str, quiet: bool) -> None:
    """The report or the document on stdout, and where the file is."""
    if format == "json":
        from curvscope.cli.show import print_document
        from curvscope.present import json

        print_document(Output(), json.dumps(run))
    elif not quiet:
        from curvscope.present.terminal import render

        output = Output()
        render(run, output, path=target)
        output.print(f"\n  written to {target}", soft_wrap=True, markup=False, highlight=False)
        return
    if not quiet:
        messages.print(f"written to {target}", soft_wrap=True, markup=False, highlight=False)
