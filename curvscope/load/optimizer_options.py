"""What a user says of the optimizer, checked: "sgd:lr=0.1,momentum=0.9", a mapping, or options of the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from curvscope.errors import UsageError
from curvscope.load.optimizer_settings import FLAVOURS, KIND_NAMES, KINDS, kind_of
from curvscope.load.problem import OptimizerState
from curvscope.settings import LEAST_DAMPING, MOST_DAMPING, SQUARED

WHERE = "optimizer"
# Name of a number -> whether 1 is above its range.
NUMBERS = {
    "lr": False,
    "momentum": True,
    "dampening": True,
    "beta1": True,
    "beta2": True,
    "alpha": True,
    "eps": False,
    "weight_decay": False,
    "lr_decay": False,
    "momentum_decay": False,
    "damping": False,
    "clip_norm": False,
}
FIELDS = {"alpha": "beta2"}
FLAGS = {"nesterov": "nesterov", "decoupled": "decoupled", "decoupled_weight_decay": "decoupled"}
# What each optimizer has beside lr, weight_decay and clip_norm, as a user writes it.
SETTINGS_OF = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adam": ("beta1", "beta2", "eps", "decoupled"),
    "adamw": ("beta1", "beta2", "eps", "decoupled"),
    "nadam": ("beta1", "beta2", "eps", "momentum_decay", "decoupled"),
    "rmsprop": ("alpha", "eps", "momentum"),
    "adagrad": ("eps", "lr_decay"),
    "kfac": ("momentum", "nesterov", "damping", "flavour"),
    "shampoo": ("momentum", "nesterov", "damping"),
}
COMMON = ("lr", "weight_decay", "clip_norm")
TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def optimizer_options(given: Mapping[str, Any] | str) -> dict[str, Any]:
    """The options as fields of `ParameterSettings`, beside kind, damping and flavour.

    A string is a kind with numbers behind a colon, or numbers alone ("lr=0.1"); a mapping has the same keys. Numbers
    that are None count as not given. `clip_norm` is the bound on the gradient's norm (0: none).

    Raises:
        UsageError: an unknown kind or option, one that the kind does not have, or a number outside its range.
    """
    options = _split(given) if isinstance(given, str) else {str(key): value for key, value in given.items()}
    found: dict[str, Any] = {}
    for key, value in options.items():
        if value is None:
            continue
        name = key.replace("-", "_")
        if name in ("kind", "name", "optimizer") and ":" in str(value):
            found |= optimizer_options(str(value))
        elif name in ("kind", "name", "optimizer"):
            found["kind"] = _kind(str(value))
        elif name == "betas":
            first, second = value
            found |= optimizer_options({"beta1": first, "beta2": second})
        elif name in NUMBERS:
            found[FIELDS.get(name, name)] = _number(name, value)
        elif name in FLAGS:
            found[FLAGS[name]] = _flag(name, value)
        elif name == "flavour":
            if value not in FLAVOURS:
                raise UsageError(f"{value!r} is no flavour of K-FAC.", where=WHERE, remedy="Choose expand or reduce.")
            found["flavour"] = value
        else:
            raise UsageError(
                f"{key!r} is no option of an optimizer.",
                where=WHERE,
                remedy=f"Options: {', '.join([*NUMBERS, 'nesterov', 'decoupled', 'flavour'])}.",
            )
    if found.get("kind") == "adamw":
        found.setdefault("decoupled", True)
    if found.get("nesterov") and found.get("momentum") == 0.0:
        raise UsageError("Nesterov's method needs momentum.", where=WHERE, remedy="Give --momentum, e.g. 0.9.")
    if "kind" in found:
        _check(found["kind"], found)
    return found


def check_options(options: Mapping[str, Any], state: OptimizerState | None) -> None:
    """Refuse options that the checkpoint's optimizer does not have, unless they name another one.

    Raises:
        UsageError: naming the settings that it has.
    """
    if state is not None and "kind" not in options:
        _check(kind_of(state.class_name), options)


def _check(kind: str, found: Mapping[str, Any]) -> None:
    """Refuse fields that this kind does not have; of an unknown kind nothing is refused."""
    if kind not in SETTINGS_OF:
        return
    known = [*COMMON, *SETTINGS_OF[kind]]
    fields = {"kind", *(FIELDS.get(name, name) for name in known)}
    for field in found:
        if field not in fields:
            raise UsageError(
                f"{KIND_NAMES[kind]} has no {field}.",
                where=f"optimizer {kind}",
                remedy=f"Its settings are {', '.join(known)}.",
            )


def _split(words: str) -> dict[str, Any]:
    """The pairs of "sgd:lr=0.1,momentum=0.9"."""
    kind, colon, rest = words.partition(":")
    if not colon and "=" in kind:
        kind, rest = "", kind
    options: dict[str, Any] = {"kind": kind.strip()} if kind.strip() else {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = part.partition("=")
        options[key.strip()] = value.strip() if equals else "true"
    return options


def _kind(words: str) -> str:
    kind = words.lower().replace("-", "")
    if kind not in KINDS:
        raise UsageError(
            f"{words!r} is no optimizer whose stability is known.",
            where=WHERE,
            remedy=f"Choose one of {', '.join(KINDS)} ({', '.join(KIND_NAMES.values())}).",
        )
    return kind


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0 and (number < 1 or not NUMBERS[name])):
        bound = "from 0 to below 1" if NUMBERS[name] else "of 0 or more"
        raise UsageError(f"{name} must be a number {bound}; got {value!r}.", where=WHERE, remedy="Correct it.")
    if name == "damping" and number and not LEAST_DAMPING <= number <= MOST_DAMPING:
        raise UsageError(f"damping must be {SQUARED}; got {value!r}.", where=WHERE, remedy="Give the optimizer's own.")
    return number


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in (*TRUE, *FALSE):
        return str(value).lower() in TRUE
    raise UsageError(f"{name} is yes or no; got {value!r}.", where=WHERE, remedy="Write true or false.")
