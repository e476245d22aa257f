"""Set-up that every test shares."""

import torch
from jaxtyping import install_import_hook

# The matrices of the tests are small: a second thread only costs.
torch.set_num_threads(1)

# The shapes in the signatures of these parts are checked at every call.
install_import_hook(
    [
        "curvscope.extract.symmetric",
        "curvscope.extract.rows",
        "curvscope.curvature.block",
        "curvscope.curvature.kronecker",
    ],
    "beartype.beartype",
)
