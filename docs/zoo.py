"""Write docs/zoo.md: what the findings are worth on sick networks and their healthy twins.

Run it from the repository's root: `python -m docs.zoo`. It takes some minutes.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import curvscope
from curvscope import Run
from curvscope.diagnose import rules
from curvscope.diagnose.catalog import CATALOG
from curvscope.diagnose.signs import FAR
from curvscope.records import FindingRow
from docs.architectures import table_row
from sample_models.data import Digits, load_digits
from sample_models.zoo import FAULTS, KFAC, Specimen, healthy_key, outlook, twin, verdict
from sample_models.zoo_programs import PROGRAMS

SEEDS = 3
PAGE = Path(__file__).with_suffix(".md")
FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
# The codes that name a fault: any of these first counts as the right cause.
CAUSES = {
    "group_lr": ("CS504",),
    "init": ("CS211", "CS212"),
    "dead_units": ("CS202",),
    "unscaled_inputs": ("CS213",),
    "poisoned_example": ("CS214", "CS207"),
    "attention_logits": ("CS209",),
    "no_norm": ("CS215",),
    "stale_moments": ("CS505",),
    "adam_eps": ("CS506",),
    "adam_beta2": ("CS507",),
    "recurrent_weight": ("CS212", "CS211"),
    "saturated_outputs": ("CS210",),
    "kfac_damping_small": ("CS401",),
    "kfac_damping_large": ("CS402",),
}
FAMILIES = ("CS2", "CS5")
KFAC_FAMILIES = ("CS4",)


@dataclass(frozen=True)
class Case:
    """A specimen as the table needs it: what was done, what became of it, and the run."""

    specimen: Specimen
    truth: str
    run: Run

    @property
    def place(self) -> str:
        """Program, fault and seed in words."""
        return f"{self.specimen.program}, {self.specimen.fault}, seed {self.specimen.seed}"


@dataclass(frozen=True)
class Said:
    """What the findings say of one case: alarms in the order of their rank."""

    case: Case
    alarms: tuple[FindingRow, ...]

    @property
    def first(self) -> str:
        """The code of the first alarm, "none" without one."""
        return self.alarms[0].code if self.alarms else "none"

    @property
    def cause(self) -> bool:
        """Whether the first alarm is a code of the fault."""
        return self.first in CAUSES[self.case.specimen.fault]

    @property
    def layer(self) -> bool:
        """Whether the first alarm that names a layer names the struck one."""
        named = next((row.layer for row in self.alarms if row.layer), "")
        return named == self.case.specimen.layer


def analyzed(specimen: Specimen) -> Run:
    """The run: factors of two draws, and exact ones where K-FAC is the optimizer."""
    how = {"fisher": "exact"} if isinstance(specimen.optimizer, KFAC) else {"fisher": "mc", "samples": 2}
    return curvscope.analyze(
        specimen.model,
        (specimen.images, specimen.labels),
        loss="cross_entropy",
        optimizer=specimen.given_optimizer,
        **how,
    )


def said(case: Case, far: float | None = None) -> Said:
    """The alarms of a case, with the findings made anew where `far` is given."""
    run = case.run
    rows: Sequence[FindingRow] = run.tables["findings"]
    if far is not None:
        network = [row for row in run.tables["examples"] if not row.layer]
        rows = rules.find(run.model, run.layers, run.tables["coverage"], run.tables["stability"], network, far)
    families = (*FAMILIES, *(KFAC_FAMILIES if isinstance(case.specimen.optimizer, KFAC) else ()))
    return Said(case, tuple(row for row in rows if row.severity != "info" and row.code[:3] in families))


def chosen_factor(cases: Sequence[Case]) -> float:
    """The factor of `FACTORS` with the most (share of sick found - share of healthy alarmed), the largest of equals."""

    def worth(far: float) -> tuple[float, float]:
        results = [said(case, far) for case in cases]
        sick = [bool(one.alarms) for one in results if one.case.specimen.sick]
        healthy = [bool(one.alarms) for one in results if not one.case.specimen.sick]
        return _share(sick) - _share(healthy), far

    return max(FACTORS, key=worth)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def _count(flags: Iterable[bool]) -> str:
    values = list(flags)
    return f"{sum(values)} of {len(values)} ({sum(values) / len(values):.0%})" if values else "none"


def score(name: str, results: Sequence[Said], far: str) -> str:
    """One row of the summary."""
    sick = [one for one in results if one.case.specimen.sick]
    healthy = [one for one in results if not one.case.specimen.sick]
    return table_row(
        [
            name,
            far,
            _count(bool(one.alarms) for one in sick),
            _count(bool(one.alarms) for one in healthy),
            _count(one.layer for one in sick if one.case.specimen.layer),
            _count(one.cause for one in sick),
        ]
    )


def collect(digits: Digits) -> tuple[list[Case], list[Case], list[Case]]:
    """The cases that count (harmed sick and training healthy ones), sick ones that did not take, unfit healthy ones.

    A sick one whose healthy twin does not train is among those that did not take.
    """
    fit: list[Case] = []
    not_taken: list[Case] = []
    unfit: list[Case] = []
    healthy: dict[tuple[object, ...], tuple[list[float], bool]] = {}
    for fault in FAULTS.values():
        for program in fault.programs:
            for seed in range(SEEDS):
                key = healthy_key(program, fault.name, seed)
                if key not in healthy:
                    specimen = twin(digits, program, fault.name, seed, sick=False)
                    losses = outlook(specimen)
                    case = Case(specimen, verdict(losses, losses), analyzed(specimen))
                    healthy[key] = losses, case.truth == "trains"
                    (fit if case.truth == "trains" else unfit).append(case)
                expected, trains = healthy[key]
                specimen = twin(digits, program, fault.name, seed, sick=True)
                truth = verdict(outlook(specimen), expected)
                truth = truth if trains else f"{truth}, its twin does not train"
                case = Case(specimen, truth, analyzed(specimen))
                (fit if trains and truth != "trains" else not_taken).append(case)
            print(fault.name, program, flush=True)
    return fit, not_taken, unfit


def page(fit: Sequence[Case], not_taken: Sequence[Case], unfit: Sequence[Case], minutes: float) -> str:
    """The whole page."""
    shipped = [said(case) for case in fit]
    left_out: list[Said] = []
    rows = []
    for program in PROGRAMS:
        far = chosen_factor([case for case in fit if case.specimen.program != program])
        own = [said(case, far) for case in fit if case.specimen.program == program]
        rows.append(score(f"{program}, from the other three", own, f"{far:g}"))
        left_out += own
    rows.insert(0, score("all, each program left out in turn", left_out, "as below"))
    rows.append(score("all, as shipped (not held out)", shipped, f"{FAR:g}"))
    rows.append(table_row(["asked for", "", "95%", "at most 5%", "85%", "75%"]))
    sick = [one for one in left_out if one.case.specimen.sick]
    parts = [
        HEAD.format(
            sick=len(sick),
            healthy=len(fit) - len(sick),
            not_taken=len(not_taken),
            unfit=len(unfit),
            minutes=minutes,
            torch=torch.__version__.partition("+")[0],
        ),
        _table(("thresholds", "far", "sick found", "false alarms", "right layer", "right cause first"), rows),
        "\n## Confusion\n\nSick ones that are harmed, by the first alarm; each program with the factor of the other three."
        "\nHealthy ones are in the last row; **bold**: the right cause.\n\n",
        confusion(left_out),
        "\n## Ground truth\n\nWhat became of the sick ones, by seed: d diverges, s spikes, l stalls (lags behind), "
        ". trains (did not take),\nx its twin does not train.\n\n",
        truths([*fit, *not_taken]),
        "\n## What was missed, and what was blamed wrongly\n\n",
        *misses(left_out),
        unnamed(),
        "\n## What did not take\n\nNo harm done within the 40 steps (or no twin to tell), and left out above, neither right nor wrong; alarms all the same in "
        + _count(bool(said(case).alarms) for case in not_taken)
        + ".\n\n## Causes\n\nThe codes that count as a fault's name:\n\n",
        _table(
            ("fault", "codes"),
            [
                table_row(
                    [name, ", ".join(f"{code} {CATALOG[code].title}" if code in CATALOG else code for code in codes)]
                )
                for name, codes in CAUSES.items()
            ],
        ),
    ]
    return "".join(parts)


def confusion(results: Sequence[Said]) -> str:
    """Faults against the code of the first alarm."""
    codes = sorted({one.first for one in results} - {"none"})
    lines = []
    for name in [*FAULTS, "healthy"]:
        own = [one for one in results if (one.case.specimen.fault if one.case.specimen.sick else "healthy") == name]
        counts = Counter(one.first for one in own)
        right = CAUSES.get(name, ("none",))
        cells = [
            "" if not counts[code] else f"**{counts[code]}**" if code in right else str(counts[code])
            for code in ("none", *codes)
        ]
        lines.append(table_row([name, str(len(own)), *cells]))
    return _table(("fault", "count", "no alarm", *codes), lines)


def truths(cases: Sequence[Case]) -> str:
    """Faults against programs: one sign a seed."""
    signs = {"diverges": "d", "spikes": "s", "stalls": "l", "trains": "."}
    found = {
        (one.specimen.fault, one.specimen.program, one.specimen.seed): signs.get(one.truth, "x")
        for one in cases
        if one.specimen.sick
    }
    lines = [
        table_row(
            [name, *("".join(found.get((name, program, seed), "") for seed in range(SEEDS)) for program in PROGRAMS)]
        )
        for name in FAULTS
    ]
    return _table(("fault", *PROGRAMS), lines)


def misses(results: Sequence[Said]) -> list[str]:
    """One line for each sick one without alarm, each healthy one with, each wrong cause or layer."""
    lines = []
    for one in results:
        specimen, told = one.case.specimen, ", ".join(f"{row.code} {row.layer}".strip() for row in one.alarms[:3])
        if not specimen.sick:
            words = f"false alarm: {told}" if one.alarms else ""
        elif not one.alarms:
            seen = ", ".join(
                dict.fromkeys(row.code for row in one.case.run.tables["findings"] if row.code[:3] in ("CS2", "CS5"))
            )
            words = f"missed ({one.case.truth}); {_sharpness(one.case.run)}; told as info: {seen or 'nothing'}"
        elif not one.cause:
            words = f"wrong cause ({one.case.truth}): {told}"
        elif specimen.layer and not one.layer:
            words = f"wrong layer ({specimen.layer} was struck): {told}"
        else:
            words = ""
        if words:
            place = (
                one.case.place
                if specimen.sick
                else f"{specimen.program}, healthy for {specimen.fault}, seed {specimen.seed}"
            )
            lines.append(f"- {place}: {words}\n")
    return lines or ["Nothing.\n"]


def unnamed() -> str:
    """The faults that no code of this version stands for."""
    names = [name for name, codes in CAUSES.items() if not any(code in CATALOG for code in codes)]
    return f"\nNo finding of this version stands for {' and '.join(names)}.\n" if names else ""


def _sharpness(run: Run) -> str:
    row = next(
        row for row in run.tables["stability"] if row.quantity == "preconditioned_sharpness" and row.scope == "network"
    )
    return f"sharpness {row.value / row.threshold:.2g} of its threshold ({row.verdict})"


def _table(titles: Sequence[str], lines: Sequence[str]) -> str:
    return "\n".join([table_row(titles), table_row(["---"] * len(titles)), *lines]) + "\n"


HEAD = """# The zoo

Sick networks and their healthy twins, and what the findings say of them. Four programs (`sample_models/zoo_programs.py`:
MLP and CNN without norms under SGD with momentum, a transformer and a recurrent network under Adam) learn scikit-learn's
digits; one of 14 faults (`sample_models/zoo.py`) is set before or after some training, 3 seeds each. **The label does not
count**: from the checkpoint the real optimizer goes on for 40 steps on the analyzed batch of 64, beside the healthy twin's.
Only a run that diverges, spikes or ends far above its twin's is sick; rules in `sample_models.zoo.verdict`.

{sick} sick and {healthy} different healthy networks count; {not_taken} sick ones did no harm or had a twin that does not
train, and {unfit} healthy ones do not train: both are left out. An **alarm** is a warning or error of the families CS2
and CS5, and CS4 where K-FAC is the optimizer.

**Thresholds**: those of the signs (docs/signs.md) are published or choices, the same for all programs.
One was fitted: `far`, how many times over its threshold a learning rate, a weight, an input or an example is a warning by
itself. Each program is judged with the factor that gives the most (share of sick found - share of healthy alarmed) on the
other three, the largest of equals, out of 1.5, 2, 3, 4, 6, 8 and 12. The rules that turn signs into findings, and the
order of causes, were written with all four programs in sight, and so were rates and strengths of the faults; only `far`
is held out.

Float32, factors from two draws (exact for K-FAC), one core, {minutes:.1f} minutes, torch {torch}. This page is written by
`python -m docs.zoo`.

"""


def main() -> int:
    """Run the zoo, write the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    cases = collect(load_digits())
    text = page(*cases, (time.perf_counter() - start) / 60)
    PAGE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
