"""CS3xx: what the report does not cover."""

from __future__ import annotations

from curvscope.diagnose.page import Entry

ENTRIES = (
    Entry(
        "CS301",
        "parameters not covered",
        "info",
        "More than 5 % of the trainable parameters have neither Kronecker factors nor an exact block here.",
        "What the report says does not hold for them.",
        "5 % of the trainable entries (a choice); what --layers and --skip leave out does not count.",
        "tables/coverage names every parameter with the reason.",
        "See whether their form can be a linear layer; K-FAC leaves them to another optimizer.",
        "12 % of the trainable parameters have no Kronecker factors; the largest is embed.weight.",
    ),
    Entry(
        "CS302",
        "eval mode hides something",
        "info",
        "The model has BatchNorm or dropout, which act otherwise in training.",
        "Everything is computed in eval mode. With batch statistics examples depend on each other, and the "
        "curvature is another one.",
        "The model has such a module: no threshold.",
        "The GGN is a sum over examples where these are independent: arXiv:1912.10985.",
        "Read the numbers as those of evaluation. For BatchNorm repeat on batches of the training's size.",
        "Everything is computed in eval mode: BatchNorm uses its running statistics.",
    ),
)
