"""Objects named on the command line as "package.module:name"."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from curvscope.errors import CheckpointError, CurvscopeError

SPEC = re.compile(
    r"^(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)(?P<call>\(.*\))?$"
)


@dataclass(frozen=True)
class ImportSpec:
    """`module:name`, or `module:name(literal, keyword=literal)`."""

    module: str
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def is_import_spec(text: str) -> bool:
    """Whether the text has the form package.module:name."""
    return SPEC.match(text) is not None


def parse_import_spec(text: str, *, argument: str, error: type[CurvscopeError] = CheckpointError) -> ImportSpec:
    """The module, the name and the literal call arguments of `package.module:name(width=16)`.

    Raises:
        error: the text has another form, or an argument is no Python literal.
    """
    match = SPEC.match(text)
    if match is None:
        raise error(
            f"{text!r} is not of the form package.module:name.",
            where=argument,
            remedy="Write for example models:make_net, or models:make_net(width=16).",
        )
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if match["call"]:
        try:
            call = ast.parse(f"f{match['call']}", mode="eval").body
            if not isinstance(call, ast.Call) or any(k.arg is None for k in call.keywords):
                raise ValueError("not a plain call")
            args = tuple(ast.literal_eval(a) for a in call.args)
            kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError) as cause:
            raise error(
                f"The arguments in {text!r} are not plain Python values.",
                where=argument,
                remedy="Use numbers, strings, lists or dicts only, as in models:make_net(width=16).",
            ) from cause
    return ImportSpec(match["module"], match["name"], args, kwargs)


def import_object(spec: ImportSpec, *, argument: str, error: type[CurvscopeError] = CheckpointError) -> Any:
    """The object that `spec` names, looked up with the current folder importable.

    Raises:
        error: the module can't be imported (its own exception is named) or has no such name.
    """
    where = f"{argument} {spec.module}:{spec.name}"
    with user_code():
        try:
            found: Any = importlib.import_module(spec.module)
        except Exception as cause:
            raise error(
                f"The module {spec.module!r} can't be imported: {describe(cause)}.",
                where=where,
                remedy="Check the spelling, and run from the folder that holds the module (or install it).",
            ) from cause
    for part in spec.name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise error(
                f"The module {spec.module!r} has no {spec.name!r}.",
                where=where,
                remedy=f"It has: {listed(public)}." if public else "Check the spelling.",
            )
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Torch's global random state is afterwards what it was before."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def user_code() -> Iterator[None]:
    """The current folder importable while code of the user's is found and run; random state kept."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with random_state_kept():
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def describe(cause: BaseException) -> str:
    """An exception in one line: its class and the first line of its message."""
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0][:300]}".rstrip(".") if lines else type(cause).__name__


def listed(names: list[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return f"{shown}, and {len(names) - limit} more" if len(names) > limit else shown
