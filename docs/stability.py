"""Write docs/stability.md: how stability is judged, and growth predicted against growth measured on the samples.

Run it from the repository's root: `python -m docs.stability`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import curvscope
from tests.growth import OPTIMIZERS, SAMPLES, STEPS, Top, growths, kfac_growths, load_sample

PAGE = Path(__file__).with_suffix(".md")
NAMES = ("digits_mlp", "digits_cnn", "digits_vit", "text_gpt", "graph_gnn", "digits_autoencoder")
FACTORS = (0.7, 1.3)
KFAC_DAMPING = 0.05
WITHIN = 0.05
HEAD = """# Stability

Is this optimizer, with these settings, at this checkpoint, stable on this batch? This page says how that is judged; its
table is written by `python -m docs.stability`.

## What is compared

The step is linearised with everything frozen that changes slowly: second moments, bias correction, K-FAC's and
Shampoo's factors. Along an eigenvector of P⁻¹H with eigenvalue h the coordinate x then obeys two lines,

    m' = a m + c h x
    x' = (1 − d) x − lr (e m' + f h x)

and the eigenvalues of this 2×2 matrix leave the unit circle through −1 at the threshold
`h = (2 − d)(1 + a) / (lr (e c + f (1 + a)))`.

| optimizer | a, c, e, f, d | threshold on h | P |
|---|---|---|---|
| SGD | 0, 1, 1, 0, 0 | 2/lr | I |
| heavy ball β, dampening τ | β, 1 − τ, 1, 0, 0 | 2(1+β)/lr, divided by (1−τ) | I |
| Nesterov | β, 1, β, 1, 0 | 2(1+β)/((1+2β) lr) | I |
| Adam | β₁, 1 − β₁, 1, 0, 0 | (2+2β₁)/((1−β₁) lr) | (1−β₁ᵗ)(√(v/(1−β₂ᵗ)) + ε) |
| AdamW | β₁, 1 − β₁, 1, 0, lr·wd | (1+β₁)(2−lr·wd)/((1−β₁) lr) | same |
| NAdam | β₁, 1 − β₁, μ₊/(1−Πμ₊), (1−μ)/(1−Π), 0 | the formula above | √(v/(1−β₂ᵗ)) + ε |
| RMSprop, Adagrad | 0, 1, 1, 0, 0 (momentum as heavy ball) | 2/lr | √v + ε |
| K-FAC | 0, 1, 1, 0, 0 (momentum as heavy ball) | 2/lr | B ⊗ A + damping |
| Shampoo | 0, 1, 1, 0, 0 (momentum as heavy ball) | 2/lr | ⊗ (Lᵢ + damping)^(1/(2·axes)), or the stored inverse |

t is the stored step, Π NAdam's stored product, μ and μ₊ its momenta of this step and the next. L2 decay adds wd to H. Where
groups have other rates, momenta or decoupled decay, P is multiplied by threshold_i/threshold: the crossing of −1 is
then exact. amsgrad takes the running maximum for v, centered RMSprop v − mean². Parameters that the optimizer does not
hold, or with lr 0, have no part. K-FAC's P covers the layers with Kronecker factors; the others are held fixed, and then
"below" becomes "undecided". `maximize`, other optimizers and missing moments are not assessed.

Sources: the edge of stability arXiv:2103.00065; for Adam arXiv:2207.14484. NAdam's row is ours.

## The verdict

The top eigenvalue comes from Lanczos iterations with full reorthogonalization, until the residual is 1e-3 (float32) or
1e-4 (float64) of it. It is taken on the whole batch and on two random halves:

- **above**: the lowest of the three is above the threshold;
- **below**: the highest, with its residual, is below it;
- **undecided**: everything else, no halves, and iterations that did not converge (their values are lower bounds: they
  can be above, never below).

One batch biases the top eigenvalue up, one layer's block biases it down. A block above the threshold implies that the
network is unstable; a block below says nothing of the network (15 and 15 below 20 can be 30 together). The threshold is
that of full-batch steps on the quadratic model: training on mini-batches can diverge below it, and full-batch training
can hover just above it without diverging. The growth factor is the spectral radius of the 2×2 matrix: with momentum it
is reached after some steps. The rate that is judged is that of the next step.

## Clipping and schedules

**Clipping by norm** (`clip_grad_norm_`; read from checkpoints, `capture(clip_norm=)`, `--clip-norm`) multiplies the gradient by
s = min(1, c/|g|) before the optimizer sees it. Where it acts on this batch, rows `clipped_*` give the verdict with it: P⁻¹(sH
+ wd) against the same threshold, for wd = 0 the plain sharpness against threshold/s. The plain verdict stays beside it. Two
things are assumed. |g| stays what it is: as it falls, s rises to 1, and the norm from which on the clip no longer makes up
for the rate is named. Second moments are taken as stored: where the steps that v remembers were clipped like this one, v is
that of clipped gradients (Adam does not notice a constant s), and the clipped verdict is the one that counts; where they were
not, v shrinks and the sharpness rises back. Once the step along the top direction dominates the gradient, clipping bounds its
length: the iterate swings and does not diverge. Real clipped torch steps grow as predicted within 2 %
(`tests/measure/test_surroundings.py`). Clipping by value is told, not modelled.

**Schedules**: a stored scheduler of torch.optim is rebuilt and run ahead on a dummy optimizer, up to 50,000 steps, or until
its end or over a period; `scheduled_peak_lr` is the rate at the step with the lowest threshold, momentum included, against the
largest stable rate there with today's sharpness and moments (CS509). The functions of LambdaLR are not in a file: of the
Hugging Face Trainer's, `--trust` reads the arguments and the schedule is exact, else its log tells whether it still rises.

Findings: CS501 above (an error where the lowest value is over 2 times the threshold, else a warning), CS502 undecided
or above 0.8 of the threshold, CS503 not assessed. The layer named is the one with the largest share of the top
direction's energy, in coordinates where P = 1, among blocks that are above if there are any; below a share of 50 % and
without such a block none is named.

## Growth: predicted and measured

The six samples on their own batch, float64. Parameters are perturbed along the top direction and the real torch.optim
optimizer takes {steps} full-batch steps; for K-FAC a small reference with frozen factors (`tests/growth.py`, damping
{damping:g}). The loss is tilted by a linear term so that the start is stationary, what the theory freezes is put back
before every step, the momentum starts on the eigenvector, and the unperturbed trajectory is subtracted. State comes
from 30 steps with lr 0 on noisy gradients. lr is 0.7 and 1.3 times the largest stable one.

"""
TITLES = ("sample", "optimizer", "lr", "sharpness", "threshold", "predicted growth", "measured", "off by")


def table_row(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def measurements() -> Iterator[tuple[str, str, Top, float, float]]:
    """Sample, optimizer, linearisation, predicted and measured growth."""
    for name in NAMES:
        sample = load_sample(name)
        for label, make in OPTIMIZERS.items():
            for factor in FACTORS:
                yield name, label, *growths(sample, make, factor)
        run = curvscope.analyze(SAMPLES / f"{name}.pt", dtype="float64")
        for factor in FACTORS:
            yield name, "K-FAC-expand", *kfac_growths(sample, run, KFAC_DAMPING, factor)


def main() -> int:
    """Measure all, write the page; 1 where one is off by more than 5 %."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines, worst = [table_row(TITLES), table_row(("---", "---", *["---:"] * (len(TITLES) - 2)))], 0.0
    for name, label, top, predicted, measured in measurements():
        off = measured / predicted - 1
        worst = max(worst, abs(off))
        h, step = top.pair.value, top.P.step
        cells = (f"{step.lr:.3g}", f"{h:.4g}", f"{step.threshold:.4g}", f"{predicted:.4f}", f"{measured:.4f}")
        lines.append(table_row((name, label, *cells, f"{100 * off:.2g} %")))
        print(lines[-1], flush=True)
    end = f"\nThe largest deviation is {100 * worst:.2g} %; torch {torch.__version__.partition('+')[0]}.\n"
    PAGE.write_text(HEAD.format(steps=STEPS, damping=KFAC_DAMPING) + "\n".join(lines) + "\n" + end)
    return int(worst > WITHIN)


if __name__ == "__main__":
    sys.exit(main())
