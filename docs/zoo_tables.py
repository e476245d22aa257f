"""The tables of docs/zoo.md, each from cases and what was said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from curvscope.diagnose.catalog import CATALOG
from curvscope.diagnose.thresholds import Thresholds
from curvscope.measure.signs import SIGNS
from curvscope.run import Run
from docs.architectures import table_row
from docs.zoo_cases import CAUSES, SEEDS, Case, Said
from docs.zoo_fit import GRIDS, RULES
from sample_models.zoo import FAULTS

MARKS = {"diverges": "d", "spikes": "s", "stalls": "l", "trains": "."}


def table(titles: Sequence[str], lines: Iterable[str]) -> str:
    """A table of Markdown."""
    return "\n".join([table_row(titles), table_row(["---"] * len(titles)), *lines]) + "\n"


def count(flags: Iterable[bool]) -> str:
    """How many of how many, with their share."""
    values = list(flags)
    return f"{sum(values)} of {len(values)} ({sum(values) / len(values):.0%})" if values else "none"


def score(name: str, results: Sequence[Said]) -> str:
    """One row of the summary; the sick of these results all count."""
    sick = [one for one in results if one.case.sick]
    return table_row(
        [
            name,
            count(bool(one.alarms) for one in sick),
            count(bool(one.alarms) for one in results if not one.case.sick),
            count(one.layer for one in sick if one.case.layer),
            count(one.cause for one in sick),
        ]
    )


def confusion(results: Sequence[Said]) -> str:
    """Faults against the code of the first alarm."""
    codes = sorted({one.first for one in results} - {"none"})
    lines = []
    for name in [*FAULTS, "healthy"]:
        own = [one for one in results if (one.case.fault if one.case.sick else "healthy") == name]
        counts = Counter(one.first for one in own)
        right = CAUSES.get(name, ("none",))
        cells = [
            "" if not counts[code] else f"**{counts[code]}**" if code in right else str(counts[code])
            for code in ("none", *codes)
        ]
        lines.append(table_row([name, str(len(own)), *cells]))
    return table(("fault", "count", "no alarm", *codes), lines)


def truths(cases: Sequence[Case], programs: Sequence[str]) -> str:
    """Faults with their strengths against programs: one sign a seed."""
    found = {
        (one.fault, one.strength, one.program, one.seed): MARKS[one.truth] if one.twin_trains else "x"
        for one in cases
        if one.sick
    }
    lines = []
    for name, fault in FAULTS.items():
        for strength in fault.strengths:
            times = f" x{strength:g}" if strength != 1 else ""
            cells = [
                "".join(found.get((name, strength, program, seed), "-") for seed in range(SEEDS)).replace(
                    "-" * SEEDS, ""
                )
                for program in programs
            ]
            lines.append(table_row([name + times, *cells]))
    return table(("fault", *programs), lines)


def no_harm(results: Sequence[Said]) -> str:
    """Sick ones that did no harm on the batch, by what became of them later: how many alarms there are."""
    lines = []
    for later, words in (
        ("diverges", "diverges"),
        ("spikes", "spikes"),
        ("stalls", "stalls"),
        ("trains", "no harm there either"),
    ):
        own = [one for one in results if one.case.later == later]
        lines.append(table_row([words, str(len(own)), count(bool(one.alarms) for one in own)]))
    return table(("later", "count", "alarms"), lines)


def limits(fits: Mapping[str, Mapping[str, float]]) -> str:
    """Each fitted threshold: where its number comes from, what is shipped, and what each fit made of it."""
    shipped = Thresholds()
    lines = []
    for name, grid in GRIDS.items():
        value = getattr(shipped, name) if name in RULES else SIGNS[name].threshold
        cells = [f"{fit[name]:g}" for fit in fits.values()]
        lines.append(table_row([f"`{name}`", " ".join(f"{one:g}" for one in grid), f"{value:g}", *cells]))
    return table(("threshold", "grid", "shipped", *fits), lines)


def misses(results: Sequence[Said]) -> str:
    """One line for each sick one without alarm, each healthy one with, each wrong cause or layer."""
    lines = []
    for one in results:
        case, told = one.case, ", ".join(f"{row.code} {row.layer}".strip() for row in one.alarms[:3])
        if not case.sick:
            words = f"false alarm (as training goes on it {case.later}): {told}" if one.alarms else ""
        elif not one.alarms:
            seen = ", ".join(
                dict.fromkeys(row.code for row in case.run.tables["findings"] if row.code[:3] in ("CS2", "CS5"))
            )
            words = f"missed ({case.truth}); {_sharpness(case.run)}; told as info: {seen or 'nothing'}"
        elif not one.cause:
            words = f"wrong cause ({case.truth}): {told}"
        elif case.layer and not one.layer:
            words = f"wrong layer ({case.layer} was struck): {told}"
        else:
            words = ""
        if words:
            lines.append(f"- {case.place}: {words}\n")
    return "".join(lines) or "Nothing.\n"


def causes() -> str:
    """The codes that count as each fault's name."""
    return table(
        ("fault", "codes"),
        [
            table_row([name, ", ".join(f"{code} {CATALOG[code].title}" for code in codes)])
            for name, codes in CAUSES.items()
        ],
    )


def _sharpness(run: Run) -> str:
    row = next(
        row for row in run.tables["stability"] if row.quantity == "preconditioned_sharpness" and row.scope == "network"
    )
    return f"sharpness {row.value / row.threshold:.2g} of its threshold ({row.verdict})"
