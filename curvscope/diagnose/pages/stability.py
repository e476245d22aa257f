"""CS5xx: whether the optimizer, with these settings, is stable here."""

from __future__ import annotations

from curvscope.diagnose.page import Entry

EDGE = "arXiv:2103.00065; preconditioned, for Adam arXiv:2207.14484"

ENTRIES = (
    Entry(
        "CS501",
        "unstable at this learning rate",
        "error where even the lowest value is over twice the threshold, warning otherwise; info where Adam's bias "
        "correction, or this batch's gradient in v, brings it below with the next steps",
        "The largest eigenvalue of the preconditioned Hessian is above what the optimizer's step can bear: on the "
        "batch and on both halves of it.",
        "Along its eigenvector every step multiplies the distance to the optimum by the growth factor: the loss "
        "rises until something else stops it.",
        "That of the optimizer: 2/lr for SGD, 2 (1 + beta)/lr with momentum, (2 + 2 beta1)/((1 - beta1) lr) for "
        "Adam; all in docs/stability.md. Full-batch training hovers just above it for long without diverging, "
        "hence the factor 2. The stored v of Adam and RMSprop is frozen for it; where it is above, the sharpness "
        "under the v of the very next step, which has taken this batch's gradient in, is computed, too "
        "(next_sharpness): a token that the optimizer has never seen is sharp by the first alone.",
        EDGE,
        "Lower the learning rate under the value that the finding names, or warm it up; remove the cause it names. "
        "Gradient clipping that acts shortens the step and raises the threshold, as long as the gradient stays as "
        "large: the finding names both thresholds, and an error becomes a warning where the clipped step is stable.",
        "Adam: sharpness 21000 (on 64 examples, 18100 to 26000 with its halves) is above the threshold 12700.",
    ),
    Entry(
        "CS502",
        "near the stability threshold",
        "info",
        "The sharpness can't be told from the threshold, or is over 0.8 of it.",
        "A slightly larger learning rate, or another batch, may be unstable.",
        "Between 0.8 of the threshold and it, or a spread over the halves of the batch that holds it (a choice).",
        EDGE,
        "Repeat with a larger batch.",
        "SGD: sharpness 76.2 (on 64 examples, 3.75 to 152 with its halves) is below the threshold 190, but close to it "
        "on a part of the batch.",
    ),
    Entry(
        "CS503",
        "stability not assessed",
        "info",
        "Something that the verdict needs is missing: optimizer, learning rate, moments, or second derivatives.",
        "Missing is not stable.",
        "None.",
        EDGE,
        "Name the optimizer (--optimizer, --lr, ...), or analyze a checkpoint that holds its state.",
        "Whether training is stable was not assessed: no optimizer is known.",
    ),
    Entry(
        "CS504",
        "a learning rate stands out",
        "warning over 4 times its threshold, or where the sharpness on the whole batch is above its own; otherwise "
        "info on its own, as severe as the worst of what it causes",
        "One layer's learning rate is far above the others'.",
        "The largest rate over curvature bounds all: one group can make the network unstable.",
        "Over 4 times the median of the layers' learning rates (a choice).",
        EDGE,
        "Lower the group's learning rate, unless it is meant.",
        "3: its learning rate is 10 times the median of all layers' (learning rate 0.5, median 0.05).",
    ),
    Entry(
        "CS505",
        "second moments are stale",
        "warning",
        "The gradient is far larger than the optimizer's running second moment says.",
        "Adam divides by a size that was right earlier: the step is as many times too long. Loss spikes follow "
        "within a few steps.",
        "RMS of g / sqrt(v) over the whole network at least 2.3, on the batch and its halves, v bias-corrected and "
        "with this gradient taken in, not under eps^2. In the paper loss spikes follow 1 to 8 steps after v has "
        "underestimated the squared gradients, and dividing the learning rate by max(1, RMS) avoids them. The number "
        "2.3 itself is a choice.",
        "arXiv:2304.13013.",
        "Divide the learning rate by the value (update clipping); lower beta2; after a change of data start the "
        "moments anew.",
        "RMS of g / sqrt(v) is 8.31 (7.9 to 9.2 with halves of the batch), threshold 2.3.",
    ),
    Entry(
        "CS506",
        "eps decides the step",
        "warning",
        "eps is larger than the root of the second moment in most entries.",
        "The optimizer is gradient descent with learning rate lr / eps there: usually far too slow.",
        "More than 50 % of the entries that ever had a gradient (a choice).",
        "Adam arXiv:1412.6980.",
        "Lower eps (1e-8 is the default), or raise the learning rate accordingly.",
        "In 100% of the entries eps is larger than sqrt(v).",
    ),
    Entry(
        "CS507",
        "beta2 is too small for beta1",
        "warning",
        "Adam's beta1 is not below sqrt(beta2).",
        "The momentum outlives the second moment it is divided by: gradients from before are scaled by a size that "
        "has been forgotten. Convergence proofs fail, and examples diverge.",
        "beta1 / sqrt(beta2) over 1: the condition of the proof.",
        "arXiv:2208.09632; arXiv:1904.09237.",
        "beta2 = 0.999, or 0.95 for large batches.",
        "beta1 is 2.85 times sqrt(beta2).",
    ),
    Entry(
        "CS508",
        "the step is long for the weights",
        "info; warning from a step of half the weights' length on",
        "The optimizer's next step is long against the weights it changes.",
        "The quadratic model, the moments and the features do not survive such a step.",
        "||step|| / ||weights|| over 0.1 (a choice; 1e-3 is usual).",
        "Compare the trust ratio of LARS, arXiv:1708.03888.",
        "Lower the learning rate, or warm it up.",
        "The next step is 0.31 times as long as the weights themselves.",
    ),
    Entry(
        "CS509",
        "the schedule leads above the threshold",
        "info; warning where the rate at the peak is over twice the largest stable one",
        "The stored learning rate scheduler will set a rate that the sharpness of today does not bear.",
        "Where the sharpness does not fall as the rate rises, training becomes unstable on the way to the peak.",
        "The optimizer's own threshold at the tightest step ahead, its momentum there included. The scheduler is run "
        "ahead from its stored state; sharpness and moments are those of now.",
        EDGE + "; that a warm-up leads out of regions of high curvature into ones that bear a higher learning rate "
        "arXiv:2110.04369 (by its abstract).",
        "A lower peak or a longer warm-up; analyze again nearer to the peak.",
        "SGD, lr 0.04: today's sharpness bears a learning rate up to 0.21; the schedule goes to 1 (OneCycleLR: in 90 "
        "scheduler steps, with today's sharpness and moments).",
    ),
)
