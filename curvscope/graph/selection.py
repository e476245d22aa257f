"""Which layers there are by name, and which of them the user wants."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Sequence

from curvscope.errors import ModelError, UsageError


def layer_names(weights: Sequence[str]) -> dict[str, str]:
    """Weight name -> layer name: its module's path, or its own where that module owns several; `model` at the root."""
    owners = Counter(weight.rpartition(".")[0] for weight in weights)
    names = {}
    for weight in weights:
        owner = weight.rpartition(".")[0]
        names[weight] = weight if owners[owner] > 1 else owner or "model"
    return names


def selected(name: str, keep: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether the globs keep this layer."""
    kept = not keep or any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
    return kept and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)


def require_layers(
    found: Sequence[str], keep: Sequence[str], skip: Sequence[str], parameters: Collection[str] = ()
) -> None:
    """Refuse a selection that leaves nothing, and a glob that matches nothing: neither a layer nor a module of weights.

    `parameters` are the names of the model's.

    Raises:
        ModelError: the globs match none of the layers found, or leave all of them out.
        UsageError: one of several matches nothing.
    """
    shown = ", ".join(found[:8]) + (f", ... ({len(found)} in all)" if len(found) > 8 else "")
    remedy = f"The model's linear layers are: {shown}."
    if found and not any(selected(name, keep, skip) for name in found):
        matched = any(selected(name, keep, ()) for name in found)
        kept = "all that --layers keeps" if keep else "all of them"
        raise ModelError(
            f"No layer is left to analyze: {f'--skip leaves out {kept}' if matched else 'the patterns match none'}.",
            where=" ".join([*(["--layers", *keep] if keep else []), *(["--skip", *skip] if skip else [])]),
            remedy=remedy,
        )
    known = {*found, *parameters, *(name.rpartition(".")[0] for name in parameters)}
    for option, patterns in (("--layers", keep), ("--skip", skip)):
        for pattern in patterns:
            if found and not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                raise UsageError(f"The pattern {pattern!r} matches no layer.", where=option, remedy=remedy)


def require_trainable(weights: Sequence[str], requires_grad: dict[str, bool]) -> None:
    """Refuse a model without a linear layer that is trained.

    Raises:
        ModelError: there are no linear layers, or every one of them is frozen.
    """
    if not weights:
        raise ModelError(
            "The model has no linear layer whose weight is a parameter.",
            where=f"{len(requires_grad)} parameters",
            remedy="curvscope analyzes nn.Linear, nn.Conv1d/2d/3d, nn.Embedding and products with a parameter; this "
            "model has none.",
        )
    if not any(requires_grad[weight] for weight in weights):
        raise ModelError(
            "Every linear layer is frozen: none of their weights requires a gradient.",
            where=f"{len(weights)} weights, the first is {weights[0]}",
            remedy="Set requires_grad_(True) on the parameters that are trained before saving or analyzing.",
        )
