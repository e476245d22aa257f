"""Write docs/zoo.md: what the findings are worth on sick networks and their healthy twins.

Run it from the repository's root: `python -m docs.zoo [FOLDER]`. It takes some minutes. With a folder every network's
run is kept there, so that rules and thresholds can be tried on all of them in seconds.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from docs.zoo_cases import CAUSES, Case, Said, collect, said
from docs.zoo_fit import GRIDS, fitted, thresholds
from docs.zoo_tables import causes, confusion, count, limits, misses, no_harm, score, table, table_row, truths
from sample_models.data import load_digits, load_tumours
from sample_models.zoo import FAULTS
from sample_models.zoo_programs import PROGRAMS

PAGE = Path(__file__).with_suffix(".md")
FIFTH_PROGRAM = "residual"
SUMMARY = ("networks", "sick found", "false alarms", "right layer", "right cause first")


@dataclass(frozen=True)
class Judged:
    """The programs' cases as thresholds judge them that were fitted on the other programs, and those thresholds."""

    held_out: Sequence[Said]
    fits: Mapping[str, Mapping[str, float]]


def counted(cases: Sequence[Case]) -> list[Case]:
    """Those that count: harmed sick ones and healthy ones that train."""
    return [case for case in cases if case.harmed or case.healthy]


def judge(cases: Sequence[Case], programs: Sequence[str]) -> Judged:
    """Each program with the thresholds that the others give."""
    fits = {
        f"without {program}": fitted([case for case in counted(cases) if case.program != program])
        for program in programs
    }
    said_of = [said(case, thresholds(fits[f"without {case.program}"])) for case in cases]
    return Judged(said_of, fits)


def page(cases: Sequence[Case], unseen: Sequence[Case], programs: Sequence[str]) -> str:
    """The whole page, of the programs' cases and those of the unseen one."""
    judged = judge(cases, programs)
    everywhere = fitted(counted(cases))
    fresh = [said(case, thresholds({})) for case in counted(unseen)]
    refitted = [said(case, thresholds(everywhere)) for case in counted(unseen)]
    every = judged.held_out
    held = [one for one in every if one.case.harmed or one.case.healthy]
    shipped = [said(case, thresholds({})) for case in counted(cases)]
    rows = [score("**all, each program left out in turn**", held)]
    rows += [
        score(f"{name}, from the other three", [one for one in held if one.case.program == name]) for name in programs
    ]
    own = [one for one in held if not one.case.sick or one.case.strength == FAULTS[one.case.fault].strengths[0]]
    rows += [
        score("the same, only the first strength of each fault", own),
        score("the same, harm as training goes on counts, too", _later(every)),
        score("all, as shipped (not held out)", shipped),
        score("**the fifth program, as shipped**", fresh),
        score("the fifth program, thresholds from the other four", refitted),
        table_row(["asked for", "95%", "at most 5%", "85%", "75%"]),
    ]
    idle = [one for one in every if one.case.idle]
    spared = [one for one in held if not one.case.sick]
    parts = [
        HEAD.format(
            choices=len(GRIDS),
            torch=torch.__version__.partition("+")[0],
            fifth=", ".join(dict.fromkeys(case.program for case in unseen)),
            **_counts("fifth_", unseen),
            **_counts("", cases),
        ),
        table(SUMMARY, rows),
        CONFUSION,
        confusion(held),
        TRUTH,
        truths(cases, programs),
        "\n## What was missed, and what was blamed wrongly\n\n",
        misses(held),
        MISSED,
        FIFTH,
        confusion(fresh),
        "\n",
        truths(unseen, list(dict.fromkeys(case.program for case in unseen))),
        "\n",
        misses(fresh),
        NO_HARM.format(idle=len(idle)),
        no_harm(idle),
        LATER.format(later=count(one.case.later != "trains" for one in spared)),
        THRESHOLDS,
        limits({**judged.fits, "all": everywhere}),
        "\n## Causes\n\nThe codes that count as a fault's name:\n\n",
        causes(),
    ]
    return "".join(parts)


def _counts(prefix: str, cases: Sequence[Case]) -> dict[str, int]:
    """How many count and how many do not, by name."""
    return {
        f"{prefix}sick": sum(case.harmed for case in cases),
        f"{prefix}healthy": sum(case.healthy for case in cases),
        f"{prefix}idle": sum(case.idle for case in cases),
        f"{prefix}lost": sum(case.sick and not case.twin_trains for case in cases),
        f"{prefix}unfit": sum(not case.sick and not case.healthy for case in cases),
    }


def _later(results: Sequence[Said]) -> list[Said]:
    """The healthy ones, and the sick ones that are harmed on the batch or later, each fault at its weakest that is."""
    found: dict[tuple[str, str, int], Said] = {}
    for one in results:
        case = one.case
        if case.sick and case.twin_trains and {case.truth, case.later} != {"trains"}:
            found.setdefault((case.program, case.fault, case.seed), one)
    return [*found.values(), *(one for one in results if one.case.healthy)]


HEAD = """# The zoo

Sick networks and their healthy twins, and what the findings say of them. Four programs (`sample_models/zoo_programs.py`:
MLP and CNN without norms under SGD with momentum, a transformer and a recurrent network under Adam) learn scikit-learn's
digits; one of 14 faults (`sample_models/zoo.py`) is set before or after some training, 3 seeds each. Learning rates of
one group are 10 times too large and weights of one layer start 8 times too large; where that does no harm, 100 and 30
times are tried, too. **The label does not count**: from the checkpoint the real optimizer goes on for 40 steps on the
analyzed batch of 64, beside the healthy twin's. Only a run that diverges, spikes or ends far above its twin's is sick;
rules in `sample_models.zoo.verdict`.

{sick} sick and {healthy} different healthy networks count. Left out here and told of below are {idle} sick ones that did
no harm; {lost} whose twin does not train, and {unfit} healthy ones that do not, are left out for good. An **alarm** is a
warning or error of the families CS2 and CS5, and CS4 where K-FAC is the optimizer.

**Held out** are the thresholds that are choices, {choices} of them and all at once: each program is judged with those
that a fixed rule (`docs/zoo_fit.py`) sets on the other three; the last table has them. Not held out are the rules that
turn signs into findings, the order of causes and the kinds of faults: they were written with these four programs in sight.
That is what the fifth program is for.

**The fifth program**, `{fifth}`, was written when rules and thresholds stood, and nothing was changed after it was run:
residual blocks with LayerNorm under AdamW on scikit-learn's breast cancer data. Of its sick ones {fifth_sick} are harmed on the
batch, {fifth_idle} are not (the data are easy), {fifth_lost} have no twin that trains; {fifth_healthy} healthy ones count. So it says more of
false alarms than of recall, and nothing of layers.

Float32, factors from two draws (exact for K-FAC), torch {torch}; about 15 minutes of one core. This page is written by
`python -m docs.zoo`.

"""
CONFUSION = """
## Confusion

Sick ones that are harmed, by the first alarm; each program with the thresholds of the other three. Healthy ones are in
the last row; **bold**: the right cause.

"""
TRUTH = """
## Ground truth

What became of the sick ones on the analyzed batch, by seed: d diverges, s spikes, l stalls (lags behind), . trains (no
harm), x its twin does not train, - not tried. A fault's greater strength is tried only where the lesser one did no harm.

"""
MISSED = """
The two of the CNN could not be told at the checkpoint by what was looked at: length of steps and gradients, sharpness,
and how that changes in the next step or two, are much like the healthy twin's. Within 8 more steps of the real optimizer their sharpness grows from 0.56 and 0.14 of its
threshold to over 1.1 times it (the healthy twins' to 0.4 to 0.8 of theirs); predicting that would be running the
optimizer on, which is how the truth is made here. Of the transformer's, the one with weights 8 times too large is taken
before the optimizer's first step: without moments there is no sharpness to judge, and CS211 alone is an info. The one
without norms trains, only later than its twin (after 40 steps a loss of 0.2 against 0.002): there is nothing in it to
alarm of but what is told, that it has no norms.
"""
FIFTH = """
## The fifth program

As shipped, by the first alarm; then what became of the sick ones on the batch, and what was missed or blamed wrongly.

"""
NO_HARM = """
## No harm, and alarms all the same

{idle} sick ones did no harm in the 40 steps on the analyzed batch. What became of them in 200 steps of training, on
batches drawn from all of the training data and beside the healthy twin's, judged by the same rules; and how many alarms
there are, with the thresholds of the other three programs:

"""
LATER = """
Of the healthy ones that count {later} do not "train" by the same rules in those 200 steps: among them are losses that
were low already and doubled on the way, which is common on small batches.
"""
THRESHOLDS = """
## Thresholds

Those of the sharpness (theory), of `beta1_over_root_beta2` (1, arXiv:2208.09632), the logit gap (rounding of float32) and
the share of a promised decrease (1/4, arXiv:1503.05671) are published or follow from a theorem, and are the same
everywhere. `update_rms` (2.3) is a choice that was not fitted. All others are choices: below, with their grids, what is
shipped, and what the rule made of them without one program and with all four. `far` to `lost` are explained in
`curvscope/diagnose/thresholds.py`, the rest in [signs.md](signs.md). Where the programs say nothing of a threshold, it
stays in the middle of its grid; and the grids were laid around numbers that had been found reasonable on these programs.
Choices that are part of a sign's definition (tanh beyond 0.975, p over 0.999) could not be fitted from runs.
As most grids have the shipped number in their middle, where the fit starts, it confirms more than it finds.

"""


def main() -> int:
    """Run the zoo, write the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    keep = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    programs = [name for name in PROGRAMS if name != FIFTH_PROGRAM]
    cases = collect(load_digits(), programs, keep)
    unseen = collect(load_tumours(), [FIFTH_PROGRAM], keep)
    text = page(cases, unseen, programs)
    PAGE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["CAUSES", "page"]
