"""The zoo's networks as its table needs them: what was done, what became of it, and the run; kept on disk if wished."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import curvscope
from curvscope import Run
from curvscope.diagnose import rules
from curvscope.diagnose.thresholds import Thresholds
from curvscope.records import FindingRow
from sample_models.zoo import FAULTS, KFAC, Data, Specimen, healthy_key, long_outlook, outlook, twin, verdict
from sample_models.zoo_programs import PROGRAMS

SEEDS = 3
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
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Case:
    """One network: what was done to it, what became of it, and the run.

    Attributes:
        program, fault, seed, sick, strength, layer: as of the specimen.
        kfac: whether K-FAC is its optimizer.
        twin_trains: whether the healthy twin (of a healthy one: itself) trains on the analyzed batch.
        truth: what becomes of it on that batch (`sample_models.zoo.verdict` of `outlook`).
        later: what becomes of it as training goes on (of `long_outlook`).
        run: the analysis.
    """

    program: str
    fault: str
    seed: int
    sick: bool
    strength: float
    layer: str
    kfac: bool
    twin_trains: bool
    truth: str
    later: str
    run: Run

    @property
    def harmed(self) -> bool:
        """A sick one that counts: its twin trains, and it does not."""
        return self.sick and self.twin_trains and self.truth != "trains"

    @property
    def idle(self) -> bool:
        """A sick one that does no harm on the batch."""
        return self.sick and self.twin_trains and self.truth == "trains"

    @property
    def healthy(self) -> bool:
        """A healthy one that counts."""
        return not self.sick and self.truth == "trains"

    @property
    def place(self) -> str:
        """Program, fault and seed in words."""
        times = f" x{self.strength:g}" if self.sick and len(FAULTS[self.fault].strengths) > 1 else ""
        return f"{self.program}, {'' if self.sick else 'healthy for '}{self.fault}{times}, seed {self.seed}"


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
        return self.first in CAUSES[self.case.fault]

    @property
    def layer(self) -> bool:
        """Whether the first alarm that names a layer names the struck one."""
        named = next((row.layer for row in self.alarms if row.layer), "")
        return named == self.case.layer


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


def case_of(specimen: Specimen, healthy: tuple[list[float], list[float]]) -> Case:
    """A specimen judged beside its healthy twin's two outlooks, and analyzed."""
    own = (outlook(specimen), long_outlook(specimen)) if specimen.sick else healthy
    return Case(
        specimen.program,
        specimen.fault,
        specimen.seed,
        specimen.sick,
        specimen.strength,
        specimen.layer,
        isinstance(specimen.optimizer, KFAC),
        verdict(healthy[0], healthy[0]) == "trains",
        verdict(own[0], healthy[0]),
        verdict(own[1], healthy[1]),
        analyzed(specimen),
    )


def collect(data: Data, programs: Sequence[str], keep: Path | None = None) -> list[Case]:
    """All cases of the programs: each healthy twin once, of each fault the strengths up to the first that does harm.

    With `keep`, a folder, what is there already is read and what is made is written.
    """
    found: list[Case] = []
    seen: dict[tuple[object, ...], tuple[list[float], list[float]]] = {}
    for program in programs:
        for fault in FAULTS.values():
            for seed in range(SEEDS if program in fault.programs else 0):
                key = healthy_key(program, fault.name, seed)
                name = f"{program}-{fault.name}-{seed}"
                if key not in seen:
                    seen[key], case = _kept(keep, f"{name}-healthy", lambda: _healthy(data, program, fault.name, seed))
                    found.append(case)
                found += _strengths(data, program, fault.name, seed, seen[key], keep, name)
            print(program, fault.name, flush=True)
    return found


def _healthy(data: Data, program: str, fault: str, seed: int) -> tuple[tuple[list[float], list[float]], Case]:
    """The outlooks of the healthy twin, and its case."""
    specimen = twin(data, program, fault, seed, sick=False)
    ahead = outlook(specimen), long_outlook(specimen)
    return ahead, case_of(specimen, ahead)


def _strengths(
    data: Data,
    program: str,
    fault: str,
    seed: int,
    healthy: tuple[list[float], list[float]],
    keep: Path | None,
    name: str,
) -> Iterator[Case]:
    """The sick ones of a fault, the weakest first, up to the first that is harmed."""
    for strength in FAULTS[fault].strengths:

        def make(strength: float = strength) -> Case:
            return case_of(twin(data, program, fault, seed, sick=True, strength=strength), healthy)

        case = _kept(keep, f"{name}-{strength:g}", make)
        yield case
        if case.truth != "trains":
            return


def _kept(folder: Path | None, name: str, make: Callable[[], Kept]) -> Kept:
    """What lies in the folder under this name, made and put there if nothing does."""
    if folder is None:
        return make()
    path = folder / f"{name}.pickle"
    if not path.exists():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_bytes(pickle.dumps(made))
        path.with_suffix(".part").rename(path)
    kept: Kept = pickle.loads(path.read_bytes())
    return kept


def said(case: Case, limits: Thresholds | None = None) -> Said:
    """The alarms of a case, with the findings made anew where thresholds are given."""
    run = case.run
    rows: Sequence[FindingRow] = run.tables["findings"]
    if limits is not None:
        network = [row for row in run.tables["examples"] if not row.layer]
        coverage, stability, joint = (run.tables[name] for name in ("coverage", "stability", "global_damping"))
        rows = rules.find(run.model, run.layers, coverage, stability, network, limits, joint)
    families = (*FAMILIES, *(KFAC_FAMILIES if case.kfac else ()))
    return Said(case, tuple(row for row in rows if row.severity != "info" and row.code[:3] in families))


__all__ = ["CAUSES", "PROGRAMS", "Case", "Said", "analyzed", "case_of", "collect", "said"]
