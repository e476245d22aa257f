"""Set-up that every test shares."""

import torch

# The matrices of the tests are small: a second thread only costs.
torch.set_num_threads(1)
