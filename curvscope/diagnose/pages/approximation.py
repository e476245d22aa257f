"""CS1xx: how well a Kronecker product can describe a layer."""

from __future__ import annotations

from curvscope.diagnose.page import Entry

SEVERITY = (
    "warning where the optimizer is K-FAC or Shampoo or not known; info under any other: it does not use the factors"
)

ENTRIES = (
    Entry(
        "CS101",
        "K-FAC-reduce is blind",
        SEVERITY,
        "The B of K-FAC-reduce vanishes for the layer, or for the middle third of its rows, though the exact block "
        "does not.",
        "Under reduce the layer's step is the gradient divided by the damping: as if it had no curvature at all. "
        "Softmax ignores a shift of the keys, so the output gradients of a key projection sum to zero over the "
        "positions.",
        "The trace of reduce's approximation is under 1e-6 of the exact one; for packed queries, keys and values "
        "the middle third of B's diagonal is, and holds more than 1e-3 of expand's. Rounding leaves about 1e-13: "
        "any value between serves.",
        "arXiv:2311.00636 (expand and reduce); the vanishing itself follows from the shift invariance of softmax.",
        "Use K-FAC-expand for this layer. Where queries, keys and values share one weight, treat the keys' rows as "
        "a layer of their own.",
        "blocks.0.self_attn: B vanishes on rows 32 to 63 of 96 (trace 1.3e-14; expand's is 3.9e-01).",
    ),
    Entry(
        "CS102",
        "no K-FAC is close",
        SEVERITY,
        "Both K-FACs are more than 0.5 off in relative Frobenius error.",
        "Steps along directions that the product gets wrong are too long or too short by as much. Where the "
        "nearest single Kronecker product is hardly better, no choice of two factors helps. K-FAC may still be a good "
        "preconditioner: what its steps are worth stands under damping and steps.",
        "Relative error above 0.5 (a choice). The nearest product is named as the limit where its error is over "
        "0.8 of the better K-FAC's, EKFAC as the remedy where its error is under 0.5 of it, a source where it has half "
        "of the error (choices). Shares of the error are those of tables/sources.",
        "arXiv:1503.05671, section 3.1; nearest product: Van Loan and Pitsianis, 1993; EKFAC arXiv:1806.03884.",
        "EKFAC where it halves the error. Otherwise by the source of the error: where it is the inputs' mean, centre "
        "them; where positions add up, take the flavour that is closer; where curvature goes with the inputs, EKFAC "
        "corrects a part. What is left is for damping.",
        "stem: relative errors 0.96 (expand) and 0.98 (reduce); of expand's error 99 % comes from positions adding up.",
    ),
    Entry(
        "CS103",
        "the K-FAC flavours differ",
        "info",
        "Expand and reduce differ by more than 1.5 times in error.",
        "The flavour is a choice that most implementations make for the whole network.",
        "The larger error over 0.1 and over 1.5 times the smaller (a choice), the smaller at most 0.5.",
        "arXiv:2311.00636.",
        "Take the closer flavour for this layer.",
        "proj: relative errors 0.12 (expand), 0.41 (reduce).",
    ),
    Entry(
        "CS104",
        "K-FAC's trace is off",
        "info",
        "The trace of the better K-FAC is more than twice, or less than half, that of the exact block.",
        "Where damping does not decide, steps are too short or too long by this factor on average.",
        "Trace ratio outside 1/2 to 2 (a choice).",
        "The trace ratio of EKFAC is 1 by construction: arXiv:1806.03884.",
        "Scale the factors, or use EKFAC.",
        "stem: its better K-FAC understates the curvature about 10 times (tr M / tr G = 0.097).",
    ),
)
