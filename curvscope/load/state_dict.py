"""Finding the weights in what a file holds, and loading them strictly into the factory's model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import CheckpointError, ModelError
from curvscope.load.importing import (
    describe,
    import_object,
    listed,
    parse_import_spec,
    user_code,
)

Factory = str | Callable[[], nn.Module]
MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "model_state")
PREFIXES = ("module.", "_orig_mod.", "model.")
SHARDED_TYPES = ("DTensor", "ShardedTensor")
LIST_LIMIT = 6


def is_state_dict(value: Any) -> bool:
    """Whether it maps names to tensors (extra states of modules aside)."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(item, Tensor) for item in value.values())
        and all(
            isinstance(name, str) and (isinstance(item, Tensor) or name.endswith("_extra_state"))
            for name, item in value.items()
        )
    )


def find_weights(content: Any, where: str) -> tuple[Mapping[str, Tensor] | nn.Module, str]:
    """The state_dict or module in a checkpoint, and the key it was under ("" for a bare one).

    Raises:
        CheckpointError: there is none, or it is a shard of one.
    """
    if isinstance(content, nn.Module):
        return content, ""
    candidates: list[tuple[str, Any]] = [("", content)]
    if isinstance(content, Mapping):
        candidates += [(key, content[key]) for key in MODEL_KEYS if key in content]
    for key, value in candidates:
        if isinstance(value, nn.Module):
            return value, key
        if is_state_dict(value):
            if any(type(item).__name__ in SHARDED_TYPES for item in value.values()):
                raise sharded_error(where)
            return value, key
    raise _no_weights(content, where)


def sharded_error(where: str) -> CheckpointError:
    """The refusal of a checkpoint in pieces, in words that say how to put them together."""
    return CheckpointError(
        "This is a sharded checkpoint (torch.distributed.checkpoint, FSDP): its weights lie in several pieces.",
        where=where,
        remedy="Consolidate it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        "FOLDER model.pt "
        "(DeepSpeed: python zero_to_fp32.py FOLDER OUT), then analyze model.pt with --model "
        "package.module:factory.",
    )


def summary(weights: Mapping[str, Any], limit: int = LIST_LIMIT) -> str:
    """The first tensors with their shapes, and how many there are."""
    shown = [f"{name} {list(t.shape)}" for name, t in weights.items() if isinstance(t, Tensor)]
    return listed(shown, limit)


def build_model(factory: Factory) -> nn.Module:
    """The module a factory makes; the global random state is as it was before.

    Raises:
        CheckpointError: the factory can't be imported, fails, or makes no nn.Module.
    """
    where = f"--model {factory}" if isinstance(factory, str) else f"factory {_name(factory)}"
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    function: Any = factory
    if isinstance(factory, str):
        spec = parse_import_spec(factory, argument="--model")
        function = import_object(spec, argument="--model")
        args, kwargs = spec.args, spec.kwargs
    if isinstance(function, nn.Module):
        return copy.deepcopy(function)
    if not callable(function):
        raise CheckpointError(
            f"It is a {type(function).__name__}, not a factory that returns an nn.Module.",
            where=where,
            remedy="Name a function or class that makes the model, as in models:make_net.",
        )
    try:
        with user_code():
            model = function(*args, **kwargs)
    except Exception as cause:
        raise CheckpointError(
            f"The model factory failed: {describe(cause)}.",
            where=where,
            remedy=_call_hint(function) or "Call it on its own to see the full traceback, or add --debug.",
        ) from cause
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"The model factory returned {type(model).__name__}, not an nn.Module.",
            where=where,
            remedy="Let it return the model itself.",
        )
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> tuple[str, ...]:
    """Load the weights into the factory's model, strictly, and say which prefixes were stripped.

    The model takes the dtypes of the weights; parameters that the model ties stay tied, and need only one of
    their names in the file.

    Raises:
        CheckpointError: missing, unexpected or misshapen keys, listed.
    """
    own = model.state_dict(keep_vars=True)
    weights, notes = strip_prefixes(weights, own)
    misshapen = [
        f"{name}: file {list(tensor.shape)}, model {list(own[name].shape)}"
        for name, tensor in weights.items()
        if isinstance(own.get(name), Tensor)
        and isinstance(tensor, Tensor)
        and not _lazy(own[name])
        and own[name].shape != tensor.shape
    ]
    if misshapen:
        missing, unexpected = _compare(own, weights)
        raise _mismatch(where, missing, unexpected, misshapen)
    on_meta = any(isinstance(t, Tensor) and t.is_meta for t in own.values())
    for name, tensor in () if on_meta else weights.items():
        target = own.get(name)
        if isinstance(target, Tensor) and target.is_floating_point() and target.dtype != tensor.dtype:
            target.data = target.data.to(tensor.dtype)
    try:
        # hooks of the modules may accept names of an older version: they decide what is missing
        result = model.load_state_dict(dict(weights), strict=False, assign=on_meta)
    except RuntimeError as cause:
        raise CheckpointError(
            f"The weights do not fit the model: {describe(cause)}.",
            where=where,
            remedy="Check that the factory builds the model that was trained, with the same settings.",
        ) from cause
    present = {id(own[name]) for name in weights if isinstance(own.get(name), Tensor)}
    missing = [name for name in result.missing_keys if id(own.get(name)) not in present]
    if missing or result.unexpected_keys:
        raise _mismatch(where, missing, list(result.unexpected_keys), [])
    if result.missing_keys:
        notes = (*notes, f"Tied weights filled in: {listed(list(result.missing_keys))}.")
    return notes


def strip_prefixes(
    weights: Mapping[str, Tensor], own: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """The weights under the model's own names, and a note on the prefixes taken off.

    Wrappers put `module.` (DataParallel), `_orig_mod.` (torch.compile) or `model.` (Lightning) before every
    name, or `_orig_mod.` and `module.` somewhere inside. A prefix is taken off only while that brings more
    names into agreement.
    """
    best, taken = dict(weights), ""
    current, stripped = dict(weights), ""
    while current:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in current)), None)
        if prefix is None:
            break
        current = {name[len(prefix) :]: tensor for name, tensor in current.items()}
        stripped += prefix
        if len(own.keys() & current.keys()) > len(own.keys() & best.keys()):
            best, taken = current, stripped
    for inner in ("_orig_mod.", "module."):
        renamed = {name.replace(inner, ""): tensor for name, tensor in best.items()}
        if len(renamed) == len(best) and len(own.keys() & renamed.keys()) > len(own.keys() & best.keys()):
            best, taken = renamed, taken + inner
    return best, (f"The prefix {taken!r} was stripped from the names of the weights.",) if taken else ()


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model inside a DataParallel, DistributedDataParallel or torch.compile wrapper, and a note on it."""
    notes: list[str] = []
    while type(model).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        notes.append(f"The model was taken out of its {type(model).__name__} wrapper.")
        model = inner
    return model, tuple(notes)


def check_weights(model: nn.Module | torch.export.ExportedProgram) -> None:
    """Refuse weights or buffers that are NaN or Inf.

    Raises:
        ModelError: naming the first such tensor, how many numbers are bad, and where the first one is.
    """
    if isinstance(model, nn.Module):
        named: Iterable[tuple[str, Any]] = [*model.named_parameters(), *model.named_buffers()]
    else:
        named = model.state_dict.items()
    for name, tensor in named:
        if not isinstance(tensor, Tensor) or _lazy(tensor) or tensor.is_meta:
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        bad = ~torch.isfinite(tensor.detach())
        # a buffer may hold -inf on purpose (a causal mask); a parameter may not
        if not isinstance(tensor, nn.Parameter):
            bad &= torch.isnan(tensor.detach())
        if bool(bad.any()):
            index = [int(i) for i in bad.nonzero()[0]]
            raise ModelError(
                f"{name} holds {int(bad.sum())} of {tensor.numel()} numbers that are NaN or Inf, the first "
                "at "
                f"index {index}.",
                where=f"model, {name}",
                remedy="Training has diverged already: analyze an earlier checkpoint.",
            )


def _lazy(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.nn.parameter.is_lazy(value)


def _compare(own: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    return [n for n in own if n not in weights], [n for n in weights if n not in own]


def _mismatch(where: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> CheckpointError:
    parts = [
        f"{len(names)} {title} ({listed(names, LIST_LIMIT)})"
        for title, names in (
            ("missing from the file", missing),
            ("not in the model", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    return CheckpointError(
        f"The weights do not fit the model: {'; '.join(parts)}.",
        where=where,
        remedy="Check that the factory builds the model that was trained, with the same settings.",
    )


def _no_weights(content: Any, where: str) -> CheckpointError:
    if isinstance(content, Mapping):
        if "param_groups" in content and "state" in content:
            what = "The file holds an optimizer's state, not a model's weights."
        elif any(type(v).__name__ in SHARDED_TYPES for v in content.values()):
            return sharded_error(where)
        else:
            keys = [f"{key} ({type(value).__name__})" for key, value in content.items()]
            what = f"No weights were found in the file. It holds: {listed(keys) or 'nothing'}."
    else:
        what = f"The file holds a {type(content).__name__}, not a model's weights."
    return CheckpointError(
        what,
        where=where,
        remedy=f"Save model.state_dict(), bare or under one of the keys {', '.join(MODEL_KEYS)}.",
    )


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _call_hint(function: Any) -> str:
    try:
        needed = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
    except (TypeError, ValueError):
        return ""
    if not needed:
        return ""
    return f"It needs {listed(needed)}: give them as in module:{_name(function)}({needed[0]}=...)."
