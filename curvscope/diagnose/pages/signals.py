"""CS2xx: inputs, units, weights, attention, outputs, single examples."""

from __future__ import annotations

from curvscope.diagnose.page import Entry

RISES = "info on its own; as severe as the worst of what it causes"

ENTRIES = (
    Entry(
        "CS201",
        "no curvature",
        "warning",
        "The exact GGN block of the layer is zero on this batch.",
        "No gradient reaches the layer either: it does not train, and damping alone would decide its K-FAC step.",
        "Exactly zero.",
        "The block is J^T H J: it vanishes with the layer's part of J.",
        "Look for dead units (CS202), a saturated loss (CS210) or a branch that is cut off behind it.",
        "0: the exact GGN block is zero on this batch: no curvature reaches the layer.",
    ),
    Entry(
        "CS202",
        "dead units",
        "warning from 90 % on; below " + RISES,
        "ReLU units behind the layer are zero at every example and position of the batch.",
        "A dead unit passes no gradient: neither its own weights nor those before it learn through it, and no step "
        "brings it back.",
        "More than 50 % of the units (a choice; healthy networks have a few percent).",
        "Maas, Hannun and Ng, Rectifier nonlinearities improve neural network acoustic models, 2013.",
        "Raise the biases or start the layer anew; use a smaller learning rate, normalised inputs, or a leaky unit.",
        "fc1: 100% of its units are zero at every example and position (threshold 50%).",
    ),
    Entry(
        "CS203",
        "saturated units",
        "warning",
        "Most values of tanh or sigmoid units lie in the flat parts: |tanh| > 0.975, sigmoid within 0.0127 of an end.",
        "The slope there is under a twentieth of the steepest: gradients vanish through the layer.",
        "More than 90 % of the values (a choice; trained tanh networks reach 50 % in a first layer).",
        "Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks, 2010.",
        "Smaller weights or inputs, or a norm in front of the nonlinearity.",
        "rnn.weight_ih_l0: 97% of the values of its tanh units lie in the flat parts.",
    ),
    Entry(
        "CS204",
        "dead inputs",
        RISES,
        "Inputs of the layer are zero at every row of the batch: zero diagonal of expand's A.",
        "Their weights do not train. On this batch only: constant pixels and padding do that, too.",
        "More than 50 % of the inputs (a choice).",
        "arXiv:1503.05671 (A is the inputs' second moment).",
        "Look for dead units in the layer before; drop inputs that never vary.",
        "fc2: 62% of its inputs are zero at every row of this batch.",
    ),
    Entry(
        "CS205",
        "mean-dominated inputs",
        RISES,
        "The inputs' mean m holds most of their energy: |m|^2 / E|a|^2.",
        "All examples look alike to the layer. A has one large eigenvalue, along m, and so has the layer's "
        "curvature: it bounds the learning rate, and everything else learns slowly.",
        "More than 90 % (a choice; non-negative activations have about half).",
        "LeCun, Bottou, Orr and Mueller, Efficient BackProp, 1998, section 4.3; K-FAC's split in tables/sources.",
        "Subtract the mean: normalise the data, or put a norm in front of the layer.",
        "fc1: the mean holds 96.2% of the energy of its inputs.",
    ),
    Entry(
        "CS206",
        "ill-conditioned factors",
        "only told as a consequence",
        "A or B has eigenvalues that float32 does not resolve beside its largest.",
        "Without damping K-FAC's step is rounding in those directions.",
        "Any eigenvalue up to lambda_max n eps of float32: the usual numerical rank.",
        "arXiv:1503.05671, section 6 (damping).",
        "Remove the cause; otherwise damping decides there.",
        "fc2: K-FAC's A can't be inverted without damping: to float32 12 of 65 eigenvalues are resolved.",
    ),
    Entry(
        "CS207",
        "one example carries the curvature",
        "info",
        "One example has most of u^T G u, u the direction that the stability verdict speaks of.",
        "The step's stability hangs on one example. It may be mislabelled, or out of scale; or it is one of the "
        "few hard ones that are left late in training, as in any network.",
        "More than 50 %, of at least 8 examples (a choice). tables/examples lists the first five of the network and of "
        "every layer.",
        "The GGN is a sum over examples: arXiv:1912.10985.",
        "Look at the example. Harmless where it is merely hard: a larger batch averages it out.",
        "Example 40 (75%) carries the top direction's curvature, and 89% of the squared gradients.",
    ),
    Entry(
        "CS208",
        "one position dominates",
        "info",
        "One position (a token, or a pixel of a convolution's output) has most of the curvature that reaches a layer's "
        "outputs.",
        "The layer's step is that of one position. A pooled token, which has all of it, is not told.",
        "More than 50 % of the trace of expand's B, of at least 4 positions (a choice).",
        "arXiv:1912.10985.",
        "See what attends to it; pool over more positions.",
        "blocks.3.linear1: position 0 of 16 holds 71% of the curvature that reaches its outputs.",
    ),
    Entry(
        "CS209",
        "attention has collapsed",
        "warning",
        "Attention puts nearly all weight on one key, with large logits.",
        "The softmax is flat there: queries and keys get no gradient, or, at the few ties, a huge one. Runs diverge.",
        "Mean entropy under 0.1 of log(number of keys), and a largest |logit| over 50 (choices; arXiv:2309.14322 "
        "saw all runs with logits over 1e4 diverge).",
        "Entropy collapse arXiv:2303.06296; logit growth arXiv:2302.05442, arXiv:2309.14322.",
        "Normalise queries and keys (QK-norm); smaller query and key weights, a lower learning rate for them.",
        "blocks.0.self_attn: its entropy is 0.012 of that of even weights, with logits up to 1,870.",
    ),
    Entry(
        "CS210",
        "outputs are saturated",
        "warning where some certain outputs are wrong, or far over the threshold; info otherwise",
        "For half of the terms of the loss the softmax is certain to float32.",
        "Right terms have no gradient and no curvature left, wrong ones the full gradient: losses jump. p (1 - p) "
        "is under the resolution of float32.",
        "Median gap between the two largest logits over 24 log 2 = 16.6, where float32 rounds p to 1; a warning "
        "with any term certain (p > 0.999) of a wrong class, or over 4 times the threshold.",
        "Rounding; label smoothing arXiv:1512.00567.",
        "Scale the last layer down; label smoothing, weight decay, z-loss.",
        "head: the median gap between the two largest logits is 137, and 5% of the terms are certain of a wrong class.",
    ),
    Entry(
        "CS211",
        "weights out of scale",
        "warning over 4 times its threshold; below " + RISES,
        "The rows of one layer's weight are far longer than those of the others.",
        "Signals and gradients that pass the layer grow by as much, and the curvature of the layers around it by "
        "the square.",
        "RMS norm of the rows, sqrt(||W||^2 / d_out), over 3.5 and over 3 times the median of the other layers "
        "(choices; He's initialisation has sqrt(2), torch's default 0.58).",
        "arXiv:1502.01852.",
        "Scale the weight, or initialise it anew; a lower learning rate for it.",
        "3: the rows of its weight have norm 4.62 (RMS), 8.0 times the median of the other layers.",
    ),
    Entry(
        "CS212",
        "recurrent weight explodes",
        "warning over 3; below " + RISES,
        "A square weight that is called again and again has a large spectral radius.",
        "Signals grow with the T-th power of it until units saturate, gradients likewise where they do not.",
        "Largest |eigenvalue| over 2 (a choice; above 1 is necessary for gradients to explode; trained ones reach 2).",
        "Pascanu, Mikolov and Bengio, arXiv:1211.5063.",
        "Scale it, initialise it orthogonally, clip gradients.",
        "rnn.weight_hh_l0: its largest eigenvalue is 3.46 in modulus.",
    ),
    Entry(
        "CS213",
        "inputs out of scale",
        "warning over 4 times its threshold; below " + RISES,
        "A layer that reads the model's inputs reads them far from unit size.",
        "The curvature of the layer goes with the square of its inputs: it bounds the learning rate for all. A "
        "mean beside it makes all examples alike (CS205).",
        "RMS over 5 (a choice; normalised data have 1). Inputs that a norm takes in first are not told.",
        "LeCun, Bottou, Orr and Mueller, Efficient BackProp, 1998, section 4.3.",
        "Subtract the mean of the training data and divide by its standard deviation.",
        "1: it reads inputs of RMS 28.4, of whose energy the mean holds 51%.",
    ),
    Entry(
        "CS214",
        "an example out of scale",
        "warning where it has more than half of the curvature or of the gradient, over 4 times its threshold, or where "
        "the sharpness on the whole batch is above its own; info otherwise",
        "The inputs of one example are far larger than those of the others.",
        "Its gradient goes with its inputs, its curvature with their square: it decides the step.",
        "RMS over 10 times the median example's (a choice).",
        "The GGN and the gradient are sums over examples.",
        "Look for corruption and wrong units; leave it out, or clip inputs or gradients.",
        "Example 3 is 100 times as large as the median one; it carries 100% of the curvature along the top direction.",
    ),
    Entry(
        "CS215",
        "no normalisation",
        "warning where signals grow or shrink 10 times; otherwise told only as a cause",
        "A network with attention, or with three convolutions or more, normalises nothing.",
        "Signals grow or shrink from layer to layer, and with them gradients and curvature: the learning rate that "
        "suits one layer is wrong for the next.",
        "No norm in the graph; the RMS of the last layer's inputs over 10 or under 1/10 of the first's (choices).",
        "BatchNorm arXiv:1502.03167; LayerNorm arXiv:1607.06450.",
        "Normalise every block; or scale the initialisation to the depth (arXiv:1901.09321).",
        "The network has no normalisation (3 convolutions); signals change 0.021 times from the first layer to the "
        "last.",
    ),
)
