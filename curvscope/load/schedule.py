"""What a learning rate scheduler will do, from its stored state: torch's own scheduler, run ahead on a dummy optimizer.

A state_dict of torch.optim.lr_scheduler does not name its class; its keys tell. Those whose rule is a function of the
user (LambdaLR, MultiplicativeLR, a custom CyclicLR) do not store it: what lies ahead of them is not known.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from curvscope.load.importing import describe
from curvscope.load.problem import Schedule

# A schedule is run this far ahead at most.
MOST_STEPS = 50_000
# What a scheduler reads or writes in a group of the optimizer.
GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum")
FUNCTIONS = ("LambdaLR", "MultiplicativeLR")
UNKNOWN = "a scheduler"
# Keys that no other scheduler has, the more special first.
SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("SequentialLR", frozenset({"_schedulers", "_milestones"})),
    ("ChainedScheduler", frozenset({"_schedulers"})),
    ("LambdaLR", frozenset({"lr_lambdas"})),
    ("ReduceLROnPlateau", frozenset({"patience", "cooldown", "num_bad_epochs"})),
    ("OneCycleLR", frozenset({"total_steps", "_schedule_phases"})),
    ("CyclicLR", frozenset({"total_size", "step_ratio", "max_lrs"})),
    ("CosineAnnealingWarmRestarts", frozenset({"T_0", "T_mult", "T_cur"})),
    ("CosineAnnealingLR", frozenset({"T_max", "eta_min"})),
    ("LinearLR", frozenset({"start_factor", "end_factor", "total_iters"})),
    ("PolynomialLR", frozenset({"total_iters", "power"})),
    ("ConstantLR", frozenset({"factor", "total_iters"})),
    ("StepLR", frozenset({"step_size", "gamma"})),
    ("MultiStepLR", frozenset({"milestones", "gamma"})),
    ("ExponentialLR", frozenset({"gamma", "base_lrs"})),
)
State = Mapping[str, Any]
Make = Callable[[torch.optim.Optimizer], Any]


class UnknownAheadError(Exception):
    """What lies ahead can't be computed; the message says why."""


def schedule(state: State, groups: Sequence[Mapping[str, Any]], name: str = "") -> Schedule:
    """The rates that the scheduler sets from here on, for the optimizer's `groups` as stored.

    Where they can't be computed `problem` says why; row 0, the next step's rates, is there always.

    Args:
        state: state_dict of a scheduler of torch.optim.lr_scheduler.
        groups: `param_groups` of the optimizer's state_dict.
        name: the scheduler's class; "" tells it from the keys.
    """
    name = name or class_of(state)
    last = state.get("_last_lr")
    if isinstance(last, (list, tuple)) and not _same(last, groups):
        shown = ", ".join(f"{float(rate):g}" for rate in last[:3] if isinstance(rate, (int, float, Tensor)))
        return next_step_alone(
            name, groups, f"its last learning rate ({shown}) is not the optimizer's, which is the one judged"
        )
    try:
        steps = steps_ahead(name, state)
    except UnknownAheadError as reason:
        return _up_to_its_base(name, state, groups, str(reason))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        return next_step_alone(name, groups, f"its state can't be read: {describe(cause)}")
    return run_ahead(lambda optimizer: _made(name, state, optimizer), state, groups, steps, name)


def run_ahead(make: Make, state: State, groups: Sequence[Mapping[str, Any]], steps: int, name: str) -> Schedule:
    """The rates of the next `steps` scheduler steps (50,000 at most), by the scheduler that `make` builds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = _Groups(groups)
            before = [_kept(group) for group in optimizer.param_groups]
            scheduler = make(optimizer)
            scheduler.load_state_dict(copy.deepcopy(dict(state)))
            if name == "CyclicLR" and not _same(scheduler.get_lr(), groups):
                return next_step_alone(name, groups, "its functions are not in the file")
            for group, own in zip(optimizer.param_groups, before, strict=True):
                group.update(own)  # building a scheduler sets the rates of its first step
            rows = [_rates(optimizer.param_groups)]
            for _ in range(min(steps, MOST_STEPS)):
                scheduler.step()
                rows.append(_rates(optimizer.param_groups))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RuntimeError) as cause:
        return next_step_alone(name, groups, f"its state can't be run: {describe(cause)}")
    table = torch.tensor(rows, dtype=torch.float64)
    if not bool(table[..., 0].isfinite().all()):
        return next_step_alone(name, groups, "it sets rates that are not finite")
    return Schedule(name, table[..., 0], table[..., 1], cut=steps > MOST_STEPS)


def class_of(state: State) -> str:
    """The scheduler's class by the keys of its state, "a scheduler" where they do not tell."""
    return next((name for name, keys in SIGNATURES if keys <= set(state)), UNKNOWN)


def steps_ahead(name: str, state: State) -> int:
    """How many scheduler steps show all that the schedule still has: to its end, or over one of its periods.

    Raises:
        UnknownAheadError: its rule is not in the state, or it raises the rate without end.
    """
    if name in FUNCTIONS:
        raise UnknownAheadError("its functions are not in the file")
    if name in ("SequentialLR", "ChainedScheduler"):
        parts = [(class_of(part), part) for part in state["_schedulers"]]
        lengths = [steps_ahead(*part) for part in parts]
        if name == "ChainedScheduler":
            return max(lengths)
        return max(0, int(state["_milestones"][-1]) - int(state["last_epoch"])) + lengths[-1] + 1
    if name == "ReduceLROnPlateau":
        return 0
    if name == UNKNOWN:
        raise UnknownAheadError("it is none of torch's own kinds")
    at = max(0, int(state["last_epoch"]))
    if name in ("StepLR", "MultiStepLR", "ExponentialLR"):
        if float(state["gamma"]) > 1:
            raise UnknownAheadError(f"it raises the rate without end (gamma {float(state['gamma']):g})")
        return 0
    if name in ("ConstantLR", "LinearLR", "PolynomialLR"):
        return max(0, int(state["total_iters"]) - at)
    if name == "CosineAnnealingLR":
        period = int(state["T_max"])
        return period - at if at < period else 2 * period
    if name == "CosineAnnealingWarmRestarts":
        return math.ceil(state["T_i"] - state["T_cur"]) + 1
    if name == "OneCycleLR":
        return max(0, int(state["total_steps"]) - at - 1)
    if name == "CyclicLR":
        if state.get("mode") not in ("triangular", "triangular2", "exp_range") or state.get("_scale_fn_custom"):
            raise UnknownAheadError("its functions are not in the file")
        if state["mode"] == "exp_range" and float(state["gamma"]) > 1:
            raise UnknownAheadError(f"it raises the rate without end (gamma {float(state['gamma']):g})")
        return math.ceil(state["total_size"])
    raise UnknownAheadError("it is none of torch's own kinds")


BUILD: dict[str, Callable[[torch.optim.Optimizer, State], Any]] = {
    "StepLR": lambda o, s: lr_scheduler.StepLR(o, s["step_size"], s["gamma"]),
    "MultiStepLR": lambda o, s: lr_scheduler.MultiStepLR(o, [int(m) for m in s["milestones"]], s["gamma"]),
    "ExponentialLR": lambda o, s: lr_scheduler.ExponentialLR(o, s["gamma"]),
    "ConstantLR": lambda o, s: lr_scheduler.ConstantLR(o, s["factor"], s["total_iters"]),
    "LinearLR": lambda o, s: lr_scheduler.LinearLR(o, s["start_factor"], s["end_factor"], s["total_iters"]),
    "PolynomialLR": lambda o, s: lr_scheduler.PolynomialLR(o, s["total_iters"], s["power"]),
    "CosineAnnealingLR": lambda o, s: lr_scheduler.CosineAnnealingLR(o, s["T_max"], s["eta_min"]),
    "CosineAnnealingWarmRestarts": lambda o, s: lr_scheduler.CosineAnnealingWarmRestarts(
        o, s["T_0"], s["T_mult"], s["eta_min"]
    ),
    "OneCycleLR": lambda o, s: lr_scheduler.OneCycleLR(
        o, 1.0, total_steps=s["total_steps"], cycle_momentum=s["cycle_momentum"]
    ),
    "CyclicLR": lambda o, s: lr_scheduler.CyclicLR(
        o, list(s["base_lrs"]), list(s["max_lrs"]), mode=s["mode"], cycle_momentum=s["cycle_momentum"]
    ),
    "ReduceLROnPlateau": lambda o, s: lr_scheduler.ReduceLROnPlateau(o),
}


def _made(name: str, state: State, optimizer: torch.optim.Optimizer) -> Any:
    """A scheduler of this class that its state can be loaded into."""
    if name == "SequentialLR":
        parts = [_made(class_of(part), part, optimizer) for part in state["_schedulers"]]
        return lr_scheduler.SequentialLR(optimizer, parts, list(state["_milestones"]))
    if name == "ChainedScheduler":
        parts = [_made(class_of(part), part, optimizer) for part in state["_schedulers"]]
        return lr_scheduler.ChainedScheduler(parts, optimizer)
    return BUILD[name](optimizer, state)


class _Groups(torch.optim.Optimizer):
    """The stored groups without parameters worth the name: what a scheduler writes its rates into."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        own = [{**_kept(group), "params": [torch.nn.Parameter(torch.zeros(0))]} for group in groups]
        super().__init__(own, {key: value for group in own for key, value in group.items() if key != "params"})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def _kept(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: group[key] for key in GROUP_KEYS if key in group}
    return {key: float(value) if isinstance(value, Tensor) else value for key, value in kept.items()}


def _rates(groups: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Learning rate and momentum (or beta1) of every group; NaN for what it has not."""
    rows = []
    for group in groups:
        betas = group.get("betas")
        momentum = betas[0] if isinstance(betas, (list, tuple)) and betas else group.get("momentum", math.nan)
        rows.append((float(group["lr"]), float(momentum)))
    return rows


def fits(state: State, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a scheduler's last rates are those of these groups."""
    last = state.get("_last_lr")
    return isinstance(last, (list, tuple)) and _same(last, groups)


def _same(last: Sequence[Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the scheduler's last rates are those of the groups."""
    return len(last) == len(groups) and all(
        isinstance(rate, (int, float, Tensor))
        and group.get("lr") is not None
        and math.isclose(float(group["lr"]), float(rate), rel_tol=1e-6, abs_tol=1e-300)
        for rate, group in zip(last, groups, strict=True)
    )


def next_step_alone(name: str, groups: Sequence[Mapping[str, Any]], problem: str) -> Schedule:
    """The next step's rates alone."""
    table = torch.tensor(_rates([{"lr": math.nan, **_kept(group)} for group in groups]), dtype=torch.float64)
    return Schedule(name, table[None, :, 0], table[None, :, 1], problem)


def _up_to_its_base(name: str, state: State, groups: Sequence[Mapping[str, Any]], problem: str) -> Schedule:
    """Of a LambdaLR the base rates as well: they are the peak of a warm-up, whose function ends at 1."""
    now, base = next_step_alone(name, groups, problem), state.get("base_lrs")
    if name != "LambdaLR" or not isinstance(base, (list, tuple)) or len(base) != len(groups):
        return now
    try:
        ahead = torch.tensor([float(rate) for rate in base], dtype=torch.float64)
    except (TypeError, ValueError):
        return now
    if not bool((ahead > now.rates[0]).any()):
        return now
    rates, momenta = torch.stack([now.rates[0], ahead]), now.momenta.expand(2, -1)
    return Schedule(name, rates, momenta, f"{problem}; if it is still warming up, its base rate is its peak", True)
