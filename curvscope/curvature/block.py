"""The exact GGN block of one layer, kept as columns: every quantity without forming P x P unless P is the smaller side.

All reductions run in float64; a matrix over the weight is [d_out, d_in(+1)], vec row-major (records.CONVENTIONS).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from curvscope.curvature.eigen import eigh, eigvalsh
from curvscope.curvature.shifted import EigenSolver, Solver
from curvscope.curvature.tiles import Watch, turned_tiles
from curvscope.extract.collector import Columns
from curvscope.extract.cost import TRIDIAGONAL_FROM
from curvscope.extract.plan import PIECE_BYTES
from curvscope.extract.symmetric import GramSum


class Block:
    """G = sum over columns v v^T.

    Attributes:
        columns: the columns as the sweep kept them.
        d_out, d_in: shape of one column; d_in counts the bias.
    """

    def __init__(self, columns: Columns, d_out: int, d_in: int, piece_bytes: int = PIECE_BYTES) -> None:
        self.columns = columns
        self.d_out = d_out
        self.d_in = d_in
        self.piece_bytes = piece_bytes

    @property
    def parameters(self) -> int:
        """P."""
        return self.d_out * self.d_in

    @property
    def total_columns(self) -> int:
        """N K."""
        return self.columns.examples * self.columns.count

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        """The columns by rows of outputs: (low, high, [N K, (high - low) d_in]) in float64, columns ordered k, n."""
        values = self.columns.values
        for low, high in self._ranges():
            if values is not None:
                piece = values[:, :, low:high].double().flatten(0, 1).flatten(1)
            else:
                # formed in the columns' own dtype, whose rounding they carry anyway; summed in float64
                piece = self._formed(low, high).double()
            yield low, high, piece

    def _formed(self, low: int, high: int) -> Tensor:
        """Columns kept as rows, formed for a range of outputs: [N K, (high - low) d_in], in their own dtype."""
        if self._small is not None:
            return self._small[:, low * self.d_in : high * self.d_in]
        assert self.columns.inputs is not None and self.columns.gradients is not None
        return self._outer(self.columns.gradients[..., low:high], self.columns.inputs)

    @cached_property
    def _small(self) -> Tensor | None:
        """All columns, formed once [N K, P], where they fit in a piece or two; None where they don't."""
        if self.columns.form != "factored" or self.total_columns * self.parameters * 4 > 2 * self.piece_bytes:
            return None
        assert self.columns.inputs is not None and self.columns.gradients is not None
        return self._outer(self.columns.gradients, self.columns.inputs)

    @cached_property
    def _inputs(self) -> Tensor:
        assert self.columns.inputs is not None
        return self.columns.inputs.double()

    @staticmethod
    def _outer(gradients: Tensor, inputs: Tensor) -> Tensor:
        """sum_r g a^T for every k and n: [K, N, R, o] and [N, R, i] -> [K N, o i]."""
        if gradients.shape[2] == 1:
            product = gradients.squeeze(2).unsqueeze(-1) * inputs.squeeze(1).unsqueeze(0).unsqueeze(2)
        else:
            product = torch.matmul(gradients.transpose(2, 3), inputs)
        return product.flatten(0, 1).flatten(1)

    def _ranges(self) -> list[tuple[int, int]]:
        per_output = self.total_columns * self.d_in * 8
        step = max(1, min(self.d_out, self.piece_bytes // max(1, per_output)))
        return [(low, min(self.d_out, low + step)) for low in range(0, self.d_out, step)]

    @cached_property
    def gram(self) -> Float64[Tensor, "small small"]:
        """`V^T V` [N K, N K], or G itself [P, P] where that is what was formed: the same nonzero spectrum."""
        if self.columns.form == "formed":
            assert self.columns.block is not None
            return self.columns.block if self.columns.block.ndim == 2 else self.columns.block.sum(0)
        if self.columns.form == "outer":
            assert self.columns.gradients is not None
            g = self.columns.gradients.double().flatten(0, 1).squeeze(1)
            a = self._inputs.squeeze(1)
            inner = (a @ a.T).repeat(self.columns.count, self.columns.count)
            return (g @ g.T) * inner
        return self._gram_and_diagonal[0]

    @cached_property
    def _gram_and_diagonal(self) -> tuple[Tensor, Tensor]:
        """Both from one pass over the dense columns."""
        total = GramSum(self.total_columns, dtype=torch.float64, device=self.device)
        diagonal = []
        for low, high, piece in self.slices():
            total.add(piece.T)
            diagonal.append(_squares(piece).view(high - low, self.d_in))
        return total.result(), torch.cat(diagonal)

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        held = (self.columns.block, self.columns.values, self.columns.gradients)
        return next(tensor.device for tensor in held if tensor is not None)

    @cached_property
    def norm(self) -> float:
        """||G||_F."""
        return float(torch.linalg.norm(self.gram))

    @cached_property
    def trace(self) -> float:
        """Tr G."""
        return float(self.gram.diagonal().sum())

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " small"]:
        """The min(P, N K) leading eigenvalues of G, descending, float64, as the solver gave them."""
        values = self.solver.all_values if "solver" in self.__dict__ else eigvalsh(self.gram)
        return values.flip(0)

    @cached_property
    def eigenpairs(self) -> tuple[Float64[Tensor, " small"], Float64[Tensor, "small small"]]:
        """Eigenvalues, ascending, and eigenvectors of `gram`."""
        return eigh(self.gram)

    @cached_property
    def solver(self) -> Solver:
        """Shifted solves with `gram`; its eigenvalues come from the same decomposition."""
        relative = max(self.parameters, self.total_columns) * torch.finfo(torch.float64).eps
        large = self.columns.form != "formed" and self.total_columns >= TRIDIAGONAL_FROM
        if large and self.device.type == "cpu":
            # SciPy's import takes as long as a small model's whole analysis
            from curvscope.curvature.tridiagonal import TridiagonalSolver

            return TridiagonalSolver(self.gram, relative)
        return EigenSolver(*self.eigenpairs, relative)

    @cached_property
    def diagonal(self) -> Float64[Tensor, "d_out d_in"]:
        """diag(G) as [d_out, d_in]."""
        if self.columns.form == "formed":
            return self.gram.diagonal().view(self.d_out, self.d_in).clone()
        if self.columns.form == "outer":
            assert self.columns.gradients is not None
            g = self.columns.gradients.double().squeeze(2)
            return g.square().sum(0).T @ self._inputs.squeeze(1).square()
        return self._gram_and_diagonal[1]

    def rotated_squares(
        self,
        U_B: Float64[Tensor, "d_out d_out"],
        U_A: Float64[Tensor, "d_in d_in"],
        *,
        fast: bool = False,
        watch: Watch | None = None,
    ) -> Float64[Tensor, "d_out d_in"]:
        """`Lambda = sum (U_B^T V U_A)^2` [d_out, d_in]: the diagonal of G in the basis U_B (x) U_A.

        float64; with `fast` the rotations run in the columns' own dtype (the sums do not). `watch` is shown every tile
        of the turned columns; a formed block has none.
        """
        if self.columns.form == "formed":
            G = self.gram.view(self.d_out, self.d_in, self.d_out, self.d_in)
            # the diagonal only: (U_B (x) U_A)^T G, then one contraction with the basis itself
            half = torch.einsum("oipq,pb->oiqb", G, U_B)
            half = torch.einsum("oiqb,ob->biq", half, U_B)
            return torch.einsum("biq,ia,qa->ba", half, U_A, U_A)
        kind = self.dtype if fast else torch.float64
        result = torch.empty(self.d_out, self.d_in, dtype=torch.float64, device=U_A.device)
        for tile in turned_tiles(self.columns, U_B, U_A, dtype=kind, piece_bytes=self.piece_bytes):
            result[tile.outputs, tile.inputs] = tile.squares
            if watch is not None:
                watch(tile)
        return result

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """G vec(X), as [d_out, d_in]."""
        if self.columns.form == "formed":
            return (self.gram @ X.reshape(-1)).view(self.d_out, self.d_in)
        # In the columns' own dtype: rounding of 1e-7 in a product of float32 columns is what those already carry.
        if self.columns.gradients is not None:
            a, g = self.columns.inputs, self.columns.gradients
            assert a is not None
            turned = torch.matmul(a, X.T.to(a.dtype))  # [N, R, d_out]
            weights = torch.bmm(g.flatten(2).transpose(0, 1), turned.flatten(1).unsqueeze(-1))  # v . X, [N, K, 1]
            mixed = torch.bmm(weights.transpose(1, 2), g.flatten(2).transpose(0, 1)).view_as(turned)
            return (mixed.reshape(-1, self.d_out).T @ a.reshape(-1, self.d_in)).double()
        assert self.columns.values is not None
        flat = self.columns.values.flatten(0, 1).flatten(1)
        return ((flat @ X.reshape(-1).to(flat.dtype)) @ flat).view(self.d_out, self.d_in).double()

    def project(
        self,
        X: Float[Tensor, "m d_out d_in"],
        U_B: Float64[Tensor, "d_out d_out"] | None = None,
        U_A: Float64[Tensor, "d_in d_in"] | None = None,
        *,
        fast: bool = True,
    ) -> Float64[Tensor, "m columns"]:
        """`V^T vec(U_B X U_A^T)` of several X at once, [m, N K], columns ordered k, n; not of formed blocks.

        With `fast` the products run in the columns' own dtype (sums over slices in float64 all the same).
        """
        kind = self.dtype if fast else torch.float64
        if self.columns.form == "outer":
            assert self.columns.inputs is not None and self.columns.gradients is not None
            # turning the rows once is cheaper than turning every X
            a, g = (rows.squeeze(-2).to(kind) for rows in (self.columns.inputs, self.columns.gradients))
            a = a if U_A is None else a @ U_A.to(kind)
            g = g if U_B is None else g @ U_B.to(kind)
            half = (a @ X.to(kind).flatten(0, 1).T).unflatten(1, X.shape[:2])  # [N, m, d_out]
            each = torch.bmm(half, g.permute(1, 2, 0))  # [N, m, K]
            return each.permute(1, 2, 0).flatten(1).double()
        X = X.to(kind)
        X = X if U_A is None else X @ U_A.T.to(kind)
        X = X if U_B is None else U_B.to(kind) @ X
        if self.columns.form == "factored" and self._few(X.shape[0], formed=fast and self._small is not None):
            return self._project_rows(X)
        total = torch.zeros(X.shape[0], self.total_columns, dtype=torch.float64, device=self.device)
        for low, high in self._ranges():
            if self.columns.values is not None:
                piece = self.columns.values[:, :, low:high].flatten(0, 1).flatten(1)
            else:
                piece = self._formed(low, high)
            total += X[:, low:high].flatten(1) @ piece.to(kind).T
        return total

    def _project_rows(self, X: Tensor) -> Tensor:
        """The same of few X, in their own dtype, through the rows: the columns are not formed."""
        a, g = self.columns.inputs, self.columns.gradients
        assert a is not None and g is not None
        found = torch.empty(X.shape[0], self.columns.count, self.columns.examples, dtype=torch.float64, device=a.device)
        if a.dtype != X.dtype:
            # example by example: a copy of all rows in the other dtype takes longer than the products
            turned = X.flatten(0, 1).T
            for n in range(a.shape[0]):
                half = (a[n].to(X.dtype) @ turned).unflatten(1, X.shape[:2]).transpose(0, 1)  # [m, R, d_out]
                found[:, :, n] = half.flatten(1) @ g[:, n].flatten(1).to(X.dtype).T
            return found.flatten(1)
        step = max(1, self.piece_bytes // (a.element_size() * a.shape[0] * a.shape[1] * self.d_out))
        for low in range(0, X.shape[0], step):
            part = X[low : low + step]
            half = (a @ part.flatten(0, 1).T).unflatten(2, part.shape[:2])  # [N, R, m, d_out]
            each = torch.bmm(g.transpose(0, 1).flatten(2), half.transpose(1, 2).flatten(2).transpose(1, 2))
            found[low : low + step] = each.permute(2, 1, 0)
        return found.flatten(1)

    def _few(self, count: int, *, formed: bool) -> bool:
        """Whether going through the rows takes fewer operations for so many products than forming the columns."""
        if formed:
            return False
        assert self.columns.inputs is not None
        positions, draws = self.columns.inputs.shape[1], self.columns.count
        return count * (positions - draws) < draws * positions

    def combine(self, weights: Float64[Tensor, " columns"]) -> Float64[Tensor, "d_out d_in"]:
        """`V weights` as [d_out, d_in]: the weighted sum of the columns, ordered k, n; not of formed blocks."""
        if self.columns.values is not None:
            flat = self.columns.values.flatten(0, 1).flatten(1)
            return (weights.to(flat.dtype) @ flat).view(self.d_out, self.d_in).double()
        a, g = self.columns.inputs, self.columns.gradients
        assert a is not None and g is not None
        mixed = torch.einsum("kn,knro->nro", weights.view(g.shape[:2]).to(g.dtype), g)
        return (mixed.reshape(-1, self.d_out).T @ a.reshape(-1, self.d_in)).double()

    def combinations(self, weights: Float64[Tensor, "columns m"]) -> Float64[Tensor, "m d_out d_in"]:
        """`V weights` as m matrices, [m, d_out, d_in]; float64."""
        parts = [(piece.T @ weights).T.unflatten(1, (high - low, self.d_in)) for low, high, piece in self.slices()]
        return torch.cat(parts, dim=1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the columns are kept in."""
        held = (self.columns.block, self.columns.values, self.columns.gradients)
        return next(tensor.dtype for tensor in held if tensor is not None)

    def _rows(self, fast: bool, beside: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, R, d_in] and gradients [K, n, R, d_out] of a few examples at a time, in float64 or as kept.

        As many as fit a piece with twice their own size and `beside` numbers a column.
        """
        assert self.columns.inputs is not None and self.columns.gradients is not None
        a, g = self.columns.inputs, self.columns.gradients
        positions, count = a.shape[1], self.columns.count
        each = 8 * (2 * positions * (self.d_in + count * self.d_out) + count * beside)
        step = max(1, self.piece_bytes // each)
        for low in range(0, a.shape[0], step):
            part = a[low : low + step], g[:, low : low + step]
            yield part if fast else (part[0].double(), part[1].double())

    def contract_inputs(self, X: Float64[Tensor, "d_in d_in"], *, fast: bool = False) -> Float64[Tensor, "d_out d_out"]:
        """`sum V X V^T` [d_out, d_out] for symmetric X [d_in, d_in]: the rearranged block times vec(X).

        float64; with `fast` the products run in the columns' own dtype.
        """
        if self.columns.form == "formed":
            G = self.gram.view(self.d_out, self.d_in, self.d_out, self.d_in)
            return torch.einsum("oipq,iq->op", G, X)
        total = torch.zeros(self.d_out, self.d_out, dtype=torch.float64, device=X.device)
        if self.columns.gradients is not None:
            for a, g in self._rows(fast):
                inner = torch.bmm(a @ X.to(a.dtype), a.transpose(1, 2))  # a X a^T of every example, [n, R, R]
                weighted = inner.squeeze(1)[..., None] * g if self.columns.form == "outer" else torch.matmul(inner, g)
                total += (weighted.reshape(-1, self.d_out).T @ g.reshape(-1, self.d_out)).double()
            return total
        for piece in self._columns_in_pieces(fast):
            total += torch.tensordot(piece @ X.to(piece.dtype), piece, dims=([0, 2], [0, 2]))
        return total

    def contract_outputs(
        self, Y: Float64[Tensor, "d_out d_out"], *, fast: bool = False
    ) -> Float64[Tensor, "d_in d_in"]:
        """`sum V^T Y V` [d_in, d_in] for symmetric Y [d_out, d_out]: the rearranged block's transpose times vec(Y).

        float64; with `fast` the products run in the columns' own dtype.
        """
        if self.columns.form == "formed":
            G = self.gram.view(self.d_out, self.d_in, self.d_out, self.d_in)
            return torch.einsum("oipq,op->iq", G, Y)
        total = torch.zeros(self.d_in, self.d_in, dtype=torch.float64, device=Y.device)
        if self.columns.gradients is not None:
            for a, g in self._rows(fast):
                turned = g @ Y.to(g.dtype)
                if self.columns.form == "outer":
                    inner = (turned * g).sum((0, 3))[..., None]  # [n, 1, 1]
                else:
                    inner = torch.einsum("knro,knso->nrs", turned, g)
                total += (torch.matmul(inner, a).flatten(0, 1).T @ a.flatten(0, 1)).double()
            return total
        for piece in self._columns_in_pieces(fast):
            total += torch.tensordot(torch.matmul(Y.to(piece.dtype), piece), piece, dims=([0, 1], [0, 1]))
        return total

    def _columns_in_pieces(self, fast: bool) -> Iterator[Tensor]:
        """Dense columns, [c, d_out, d_in] a piece."""
        assert self.columns.values is not None
        flat = self.columns.values.flatten(0, 1)
        step = max(1, self.piece_bytes // (self.parameters * 8))
        for low in range(0, flat.shape[0], step):
            yield flat[low : low + step] if fast else flat[low : low + step].double()

    def pieces(self, count: int) -> Iterator[Float[Tensor, "c d_out d_in"]]:
        """The columns, at most `count` at a time, in the run's dtype and no particular order; not of formed blocks."""
        if self.columns.values is not None:
            yield from self.columns.values.flatten(0, 1).split(count)
            return
        assert self.columns.gradients is not None and self.columns.inputs is not None
        for draw in self.columns.gradients:
            for g, a in zip(draw.split(count), self.columns.inputs.split(count), strict=True):
                yield self._outer(g.unsqueeze(0), a).view(-1, self.d_out, self.d_in)

    def stacked(self) -> Float[Tensor, "columns d_out d_in"]:
        """Every column, [N K, d_out, d_in] in order n, k, in the run's dtype."""
        if self.columns.values is not None:
            values = self.columns.values
        else:
            assert self.columns.gradients is not None and self.columns.inputs is not None
            flat = self._outer(self.columns.gradients, self.columns.inputs)
            values = flat.view(self.columns.count, self.columns.examples, self.d_out, self.d_in)
        return values.transpose(0, 1).flatten(0, 1)

    def dense(self) -> Float64[Tensor, "P P"]:
        """G itself, [P, P] float64."""
        if self.columns.form == "formed":
            return self.gram
        flat = self.stacked().double().flatten(1)
        return flat.T @ flat


def _squares(piece: Tensor) -> Float64[Tensor, " columns"]:
    """The sum of squares of every column, added up in float64."""
    return torch.linalg.vector_norm(piece, dim=0, dtype=torch.float64).square()
