"""CS4xx: K-FAC's damping, from tables/ranges and tables/damping."""

from __future__ import annotations

from curvscope.diagnose.page import Entry

TOLD = "; told where the optimizer is K-FAC or not known"
SOURCE = "arXiv:1503.05671, section 6"

ENTRIES = (
    Entry(
        "CS401",
        "damping too small",
        "warning; info where the learning rate is small" + TOLD,
        "With the damping in use the layer's K-FAC step can't be trusted, in either form of damping.",
        "Directions in which K-FAC understates the curvature, or of which the batch says nothing, are amplified: "
        "the step gains far less than it promises, or the loss grows.",
        "The damping is under the safe range of tables/ranges: the decrease in the exact quadratic model is under "
        "1/4 of the promised one, or the damping under the noise of the factors. Info where the learning rate is at "
        "most 1.5 times the step's best multiple alpha_star: the part of the step that is taken then keeps 1/4 of its "
        "promise in this layer, as 1 - eta / (2 alpha_star) >= 1/4.",
        SOURCE,
        "Raise the layer's damping to the value named.",
        "fc1: with damping 1e-09 K-FAC-expand can't be trusted here: by its step the exact quadratic model grows.",
    ),
    Entry(
        "CS402",
        "damping makes it gradient descent",
        "warning" + TOLD,
        "The damping in use exceeds the curvature: the step is the gradient divided by it.",
        "K-FAC's cost buys nothing, and progress is slow.",
        "The damping is over the safe range of tables/ranges, and a tenth of the best decrease is lost by it (a "
        "choice).",
        SOURCE,
        "Lower the layer's damping towards the value named.",
        "fc1: with damping 1e+03 K-FAC-expand has become gradient descent with rate 1 / damping.",
    ),
    Entry(
        "CS403",
        "no one damping fits all layers",
        "info" + TOLD,
        "The layers' best values of damping are far apart.",
        "One value for all is too small for some layers, or gradient descent for others.",
        "A factor of 100 between the recommended values (a choice), and no one value in the safe range of all; not "
        "told where in a step of all layers (tables/global_damping) values of their own are not safe together or do no "
        "better than one for all.",
        SOURCE,
        "Set damping for each layer, or relative to the mean of its curvature.",
        "The layers want very different damping: from 2.1e-05 (head) to 0.31 (stem), a factor of "
        "1e+04; no one value is in the safe range of all.",
    ),
    Entry(
        "CS404",
        "the form of damping matters",
        "info" + TOLD,
        "The same number as M + damping and split between the factors gives steps of very different worth.",
        "A value that was tuned in one implementation is wrong in another.",
        "A difference over a quarter of the decrease in the exact quadratic model (a choice).",
        SOURCE + "; factored damping 6.3",
        "Do not carry a damping over from one form to the other.",
        "stem: how damping is added to K-FAC-expand matters here, as M + damping or split between the factors.",
    ),
    Entry(
        "CS405",
        "safe alone, not together",
        "warning" + TOLD,
        "Every layer alone stands the damping in use; the step of all layers together raises the loss.",
        "Layers add up: what each lowers by itself, all together overshoot.",
        "The change of the loss by the joint step at the current damping (table global_damping) is positive in every "
        "form; not told where the learning rate is under a quarter of that step's best multiple (a choice).",
        SOURCE,
        "Raise the damping of all layers to the value named.",
        "No layer's own block objects to damping 0.03, but the K-FAC-expand step of all layers together raises the "
        "loss by 0.0093; the best length is 0.4 of it.",
    ),
)
