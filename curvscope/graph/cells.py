"""nn.RNNCell, GRUCell and LSTMCell in terms of linear operations, as torch.nn's pages state them.

Export keeps a cell as one operation, in which no weight could be told; torch decomposes only the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def lstm_cell(
    x: Tensor,
    state: list[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """H' = o tanh(c'), c' = f c + i g, with i, f, g, o = chunks of (W_ih x + b_ih + W_hh h + b_hh)."""
    hidden, cell = state
    gates = functional.linear(x, w_ih, b_ih) + functional.linear(hidden, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, 1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_cell(
    x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """H' = n + z (h - n), n = tanh(x_n + r h_n); r, z from the sums of the first two chunks."""
    x_r, x_z, x_n = functional.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = functional.linear(hidden, w_hh, b_hh).chunk(3, 1)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return new + torch.sigmoid(x_z + h_z) * (hidden - new)


def _plain_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(
        x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Tensor:
        return activation(functional.linear(x, w_ih, b_ih) + functional.linear(hidden, w_hh, b_hh))

    return cell


def cell_decompositions() -> dict[Any, Callable[..., Any]]:
    """Operation -> its decomposition, for `ExportedProgram.run_decompositions`."""
    return {
        aten.lstm_cell.default: lstm_cell,
        aten.gru_cell.default: gru_cell,
        aten.rnn_tanh_cell.default: _plain_cell(torch.tanh),
        aten.rnn_relu_cell.default: _plain_cell(torch.relu),
    }
