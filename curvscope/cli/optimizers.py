"""Options that say what the optimizer is; they come before what the checkpoint holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

OPTIMIZER = "Optimizer (for the stability verdict; numbers come before the checkpoint's own)"


def _number(help: str) -> Any:
    return typer.Option(metavar="X", help=help, rich_help_panel=OPTIMIZER)


Optimizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:KEY=X]",
        help="sgd, adam, adamw, nadam, rmsprop, adagrad, kfac or shampoo; or with its numbers, as in "
        "sgd:lr=0.1 or kfac:lr=1,damping=1.",
        rich_help_panel=OPTIMIZER,
    ),
]
LearningRate = Annotated[float | None, _number("Learning rate of all groups.")]
Momentum = Annotated[float | None, _number("Momentum of sgd, rmsprop, kfac or shampoo.")]
Nesterov = Annotated[
    bool | None, typer.Option("--nesterov/--no-nesterov", help="Nesterov's momentum.", rich_help_panel=OPTIMIZER)
]
Beta1 = Annotated[float | None, _number("Smoothing of Adam's first moment.")]
Beta2 = Annotated[float | None, _number("Smoothing of Adam's second moment.")]
Eps = Annotated[float | None, _number("What Adam, RMSprop and Adagrad add to the root.")]
WeightDecay = Annotated[float | None, _number("Weight decay (decoupled for adamw, L2 otherwise).")]
ClipNorm = Annotated[
    float | None, _number("Bound on the gradient's norm, as in clip_grad_norm_ (0: none, whatever is stored).")
]
Damping = Annotated[float | None, _number("Its damping (kfac, shampoo), in the loss's own scale.")]


def given(kind: str | None, **numbers: Any) -> dict[str, Any] | None:
    """The options that were given, or None where there are none."""
    options = {key: value for key, value in {"kind": kind, **numbers}.items() if value is not None}
    return options or None
