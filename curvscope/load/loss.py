"""The loss as trained: its name, its settings, and the function itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvscope.errors import LossError
from curvscope.load.class_axis import CLASS_AXES, class_axis, next_tokens
from curvscope.load.importing import (
    describe,
    import_object,
    is_import_spec,
    parse_import_spec,
    user_code,
)
from curvscope.load.problem import Loss

DEFAULTS: dict[str, dict[str, Any]] = {
    "cross_entropy": {
        "reduction": "mean",
        "weight": None,
        "label_smoothing": 0.0,
        "ignore_index": -100,
        "class_axis": None,
    },
    "causal_lm": {"reduction": "mean", "ignore_index": -100},
    "mse": {"reduction": "mean"},
    "bce_with_logits": {"reduction": "mean", "weight": None, "pos_weight": None},
}
CHOICES = (
    "Choose cross_entropy, causal_lm, mse or bce_with_logits (settings after a colon, as in "
    "cross_entropy:label_smoothing=0.1,reduction=sum), or name a callable (outputs, targets) -> scalar as "
    "package.module:callable."
)
MODULES: dict[type[nn.Module], str] = {
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse",
    nn.BCEWithLogitsLoss: "bce_with_logits",
}


def load_loss(loss: Any) -> Loss:
    """The loss given as a name with settings, a torch loss module, "package.module:callable", or a callable.

    Raises:
        LossError: no loss, an unknown name or setting, or reduction="none".
    """
    if loss is None:
        raise LossError("No loss was given, and the checkpoint names none.", where="loss (--loss)", remedy=CHOICES)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        return _from_text(loss)
    if type(loss) in MODULES:
        return _from_module(loss)
    if inspect.isclass(loss) and issubclass(loss, nn.Module):
        return load_loss(loss())
    if isinstance(loss, nn.NLLLoss) or loss is functional.nll_loss:
        raise LossError(
            "NLLLoss takes log-probabilities: it is linear in them, so that its generalized Gauss-Newton matrix is 0.",
            where="loss NLLLoss",
            remedy="Return logits from the model, without log_softmax, and give loss cross_entropy: the same loss.",
        )
    if callable(loss):
        return callable_loss(loss)
    raise LossError(f"A {type(loss).__name__} is no loss.", where="loss", remedy=CHOICES)


def named_loss(name: str, settings: Mapping[str, Any] | None = None) -> Loss:
    """The named loss with these settings.

    cross_entropy: `F.cross_entropy` with reduction (mean, sum), weight [C], label_smoothing, ignore_index;
    targets are class indices or class probabilities; class_axis (second, last) says where the classes are, and without
    it the shapes of outputs and targets do, see `class_axis`. causal_lm: outputs [N, T, V] against token ids [N, T],
    each position with the token after it, with reduction and ignore_index (transformers' ForCausalLMLoss). mse:
    `F.mse_loss`. bce_with_logits: `F.binary_cross_entropy_with_logits` with reduction, weight, pos_weight. Mean and
    sum are torch's own.

    Raises:
        LossError: an unknown name or setting, or a value that the setting can't have.
    """
    if name not in DEFAULTS:
        raise LossError(f"There is no loss named {name!r}.", where="loss (--loss)", remedy=CHOICES)
    given = dict(settings or {})
    unknown = sorted(set(given) - set(DEFAULTS[name]))
    if unknown:
        raise LossError(
            f"{name} has no setting {unknown[0]!r}.",
            where=f"loss {name}",
            remedy=f"Its settings are {', '.join(DEFAULTS[name])}.",
        )
    complete = {**DEFAULTS[name], **given}
    for key in ("weight", "pos_weight"):
        if complete.get(key) is not None:
            complete[key] = torch.as_tensor(complete[key]).detach().clone()
    _check_settings(name, complete)
    return Loss(name, complete, _FUNCTIONS[name](complete), _label(name, complete))


def callable_loss(function: Callable[[Tensor, Any], Tensor], label: str = "") -> Loss:
    """Any `(outputs, targets) -> scalar` as a loss; whether it is one is checked once outputs are known."""
    label = label or getattr(function, "__name__", "") or type(function).__name__
    return Loss("callable", {}, function, label)


def _from_text(text: str) -> Loss:
    name, _, rest = text.partition(":")
    if name in DEFAULTS:
        return named_loss(name, _parse_settings(name, rest))
    if not is_import_spec(text):
        raise LossError(f"There is no loss named {name!r}.", where=f"--loss {text}", remedy=CHOICES)
    spec = parse_import_spec(text, argument="--loss", error=LossError)
    found = import_object(spec, argument="--loss", error=LossError)
    if inspect.isclass(found) or spec.args or spec.kwargs:
        try:
            with user_code():
                found = found(*spec.args, **spec.kwargs)
        except Exception as cause:
            raise LossError(
                f"The loss can't be made: {describe(cause)}.", where=f"--loss {text}", remedy=CHOICES
            ) from cause
    loss = load_loss(found)
    return callable_loss(loss.function, text) if loss.name == "callable" else loss


def _parse_settings(name: str, text: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not value:
            raise LossError(
                f"The setting {part!r} has no value.",
                where=f"--loss {name}:{text}",
                remedy="Write key=value, several separated by commas.",
            )
        settings[key] = _parse_value(name, key, value)
    return settings


def _parse_value(name: str, key: str, value: str) -> Any:
    try:
        if key in ("weight", "pos_weight"):
            return torch.tensor([float(item) for item in value.split(":")])
        if key == "label_smoothing":
            return float(value)
        if key == "ignore_index":
            return int(value)
    except ValueError as cause:
        raise LossError(
            f"{value!r} is no value for {key}.",
            where=f"--loss {name}:{key}={value}",
            remedy="weight and pos_weight are numbers joined by colons (weight=0.5:1:2), label_smoothing a "
            "number, "
            "ignore_index an integer.",
        ) from cause
    return value


def _from_module(module: nn.Module) -> Loss:
    name = MODULES[type(module)]
    settings = {key: getattr(module, key, default) for key, default in DEFAULTS[name].items()}
    return named_loss(name, settings)


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    reduction = settings["reduction"]
    if reduction not in ("mean", "sum"):
        raise LossError(
            f"reduction={reduction!r} gives no scalar that could have been trained."
            if reduction == "none"
            else f"There is no reduction {reduction!r}.",
            where=f"loss {name}",
            remedy="Choose reduction=mean or reduction=sum, whichever training used.",
        )
    smoothing = settings.get("label_smoothing", 0.0)
    if not 0.0 <= smoothing <= 1.0:
        raise LossError(
            f"label_smoothing must lie between 0 and 1; got {smoothing}.",
            where=f"loss {name}",
            remedy="Give the value that training used.",
        )
    axis = settings.get("class_axis")
    if axis is not None and axis not in CLASS_AXES:
        raise LossError(
            f"There is no class_axis {axis!r}.",
            where=f"loss {name}",
            remedy=f"Choose class_axis={' or class_axis='.join(CLASS_AXES)}, or leave it out where the shapes tell.",
        )
    for key in ("weight", "pos_weight"):
        weight = settings.get(key)
        if weight is not None and not bool((torch.isfinite(weight) & (weight >= 0)).all()):
            raise LossError(
                f"{key} must be finite and not negative, else the loss is not convex in the outputs.",
                where=f"loss {name}",
                remedy="Give the weights that training used.",
            )


def _label(name: str, settings: Mapping[str, Any]) -> str:
    shown = []
    for key, default in DEFAULTS[name].items():
        value = settings[key]
        if isinstance(value, Tensor):
            shown.append(f"{key}=[{value.numel()} values]" if value.numel() > 1 else f"{key}={value.item():g}")
        elif value != default:
            shown.append(f"{key}={value}")
    return f"{name}({', '.join(shown)})" if shown else name


def _common(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of the two dtypes: a float64 run keeps targets stored in float32."""
    dtype = torch.promote_types(outputs.dtype, targets.dtype)
    return outputs.to(dtype), targets.to(outputs.device, dtype)


def _like(weight: Tensor | None, outputs: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(outputs.device, outputs.dtype)


def _cross_entropy(settings: Mapping[str, Any]) -> Callable[[Tensor, Any], Tensor]:
    def function(outputs: Tensor, targets: Any) -> Tensor:
        if targets.is_floating_point():
            outputs, targets = _common(outputs, targets)
        targets = targets.to(outputs.device)
        if outputs.ndim > 2 and class_axis("cross_entropy", settings, outputs, targets) == outputs.ndim - 1:
            # the same sum or mean over terms, without a copy that has the classes second
            classes = outputs.shape[-1]
            targets = targets.reshape(-1, classes) if targets.is_floating_point() else targets.reshape(-1)
            outputs = outputs.reshape(-1, classes)
        return functional.cross_entropy(
            outputs,
            targets,
            weight=_like(settings["weight"], outputs),
            reduction=settings["reduction"],
            label_smoothing=settings["label_smoothing"],
            ignore_index=settings["ignore_index"],
        )

    return function


def _causal_lm(settings: Mapping[str, Any]) -> Callable[[Tensor, Any], Tensor]:
    def function(outputs: Tensor, targets: Any) -> Tensor:
        # every position stays, the last one ignored: leaving it out would copy the outputs
        return functional.cross_entropy(
            outputs.flatten(0, -2),
            next_tokens(settings, targets.to(outputs.device)).flatten(),
            reduction=settings["reduction"],
            ignore_index=settings["ignore_index"],
        )

    return function


def _mse(settings: Mapping[str, Any]) -> Callable[[Tensor, Any], Tensor]:
    def function(outputs: Tensor, targets: Any) -> Tensor:
        outputs, targets = _common(outputs, targets)
        return functional.mse_loss(outputs, targets, reduction=settings["reduction"])

    return function


def _bce_with_logits(settings: Mapping[str, Any]) -> Callable[[Tensor, Any], Tensor]:
    def function(outputs: Tensor, targets: Any) -> Tensor:
        outputs, targets = _common(outputs, targets)
        return functional.binary_cross_entropy_with_logits(
            outputs,
            targets,
            weight=_like(settings["weight"], outputs),
            pos_weight=_like(settings["pos_weight"], outputs),
            reduction=settings["reduction"],
        )

    return function


_FUNCTIONS: Mapping[str, Callable[[Mapping[str, Any]], Callable[[Tensor, Any], Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "causal_lm": _causal_lm,
    "mse": _mse,
    "bce_with_logits": _bce_with_logits,
}
