"""The decoder's projections and look-up, and the places at which adapters join them.

    y = after(W x + b + beside(x))

A projection knows which side of itself each dim of its parameters follows, and so what is put beside it can be placed
on any layout by one rule. What computes with it reads its parameters through `held` and `outputs` and leaves sums to
`joined` and `summed`, which tensor parallelism overrides (parallel/tensor.py); here a rank has everything.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Side = Literal["in", "out"] | None
IN: Side = "in"
OUT: Side = "out"


class Marks(NamedTuple):
    """What adapters must know of each position of a batch; both are (batch, seq) int64."""

    places: Tensor | None = None
    """The position's number in the whole run: dropout's masks are a function of it. None: nothing is dropped."""
    virtual: Tensor | None = None
    """Number of the virtual token there, or -1. None: there are none."""


class Linear(nn.Linear):
    """A projection, and what adapters put beside it and after it."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        """Start bare."""
        super().__init__(in_features, out_features, bias=bias)
        self.sides: dict[str, tuple[Side, ...]] = {"weight": (OUT, IN), "bias": (OUT,)}
        """What each dim of a parameter follows, by the parameter's name below this module."""
        self.beside: Callable[[Linear, Tensor, Marks | None, Tensor | None], Tensor] | None = None
        """(self, x, marks, bias or None) -> product with x, adapter and bias included; summed as the product is."""
        self.after: Callable[[Linear, Tensor], Tensor] | None = None
        """(self, output) -> output."""
        self.replaced: Callable[[Linear, Tensor, Marks | None], Tensor] | None = None
        """(self, heads, marks) -> heads: what attention puts in the place of some keys or values."""
        self.quantized: nn.Module | None = None
        """Takes the place of `weight` (models/quantized.py)."""

    def forward(
        self, input: Float[Tensor, "batch seq in"], marks: Marks | None = None
    ) -> Float[Tensor, "batch seq out"]:
        """Project each position."""
        out = self.added_up(input, marks, self.own_bias())
        return out if self.after is None else self.after(self, out)

    def added_up(self, x: Tensor, marks: Marks | None, bias: Tensor | None) -> Tensor:
        """Multiply with the weight and what is beside it, and add the bias."""
        return self.product(x, bias) if self.beside is None else self.beside(self, x, marks, bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply with the weight alone."""
        if self.quantized is not None:
            out = self.quantized(x, self)
            return out if bias is None else out + bias
        return F.linear(x, self.outputs(self.held(self.weight)), bias)

    def own_bias(self) -> Tensor | None:
        """Return the bias of the outputs that are computed here."""
        return None if self.bias is None else self.outputs(self.held(self.bias))  # pyright: ignore[reportUnnecessaryComparison]

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight that is multiplied with, in a dense format."""
        if self.quantized is not None:
            return self.quantized.dense(self, dtype)  # pyright: ignore[reportCallIssue]
        return self.outputs(self.held(self.weight)).to(dtype)

    def held(self, parameter: Tensor) -> Tensor:
        """Return what this rank has of a parameter of this module."""
        return parameter

    def outputs(self, tensor: Tensor) -> Tensor:
        """Pick the rows of the outputs that are computed here."""
        return tensor

    def summed(self, tensor: Tensor) -> Tensor:
        """Add up what each rank computed from its part of the inputs; without gradients."""
        return tensor

    def first_output(self, count: int) -> int:
        """Give the number of the first of the `count` outputs that are computed here."""
        return 0

    def first_input(self, width: int) -> int:
        """Give the number of the first of the `width` inputs that are multiplied here."""
        return 0


class _LookUp(torch.autograd.Function):
    """Rows of a table; their gradients are added up in at least fp32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        (tokens,) = ctx.saved_tensors
        precise = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return torch.ops.aten.embedding_dense_backward(precise, tokens, ctx.rows, -1, False).to(ctx.dtype), None


def look_up(table: Float[Tensor, "rows width"], numbers: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
    """Return rows of a table. On CPUs torch adds bf16 gradients up in bf16, which loses most of a frequent row's."""
    on_cpu = table.device.type == "cpu"
    return _LookUp.apply(table, numbers) if on_cpu else F.embedding(numbers, table)  # pyright: ignore


class Embedding(nn.Embedding):
    """Tokens to vectors."""

    def __init__(self, rows: int, dim: int) -> None:
        """Start bare."""
        super().__init__(rows, dim)
        self.sides: dict[str, tuple[Side, ...]] = {"weight": (IN, OUT)}
        self.beside: Callable[[Embedding, Tensor, Marks | None, Tensor], Tensor] | None = None
        """(self, tokens, marks, found) -> what is found and the adapter's part; summed as what is found is."""

    def forward(self, input: Int[Tensor, "batch seq"], marks: Marks | None = None) -> Float[Tensor, "batch seq dim"]:
        """Look up each token."""
        return self.added_up(input, marks)

    def added_up(self, tokens: Tensor, marks: Marks | None) -> Tensor:
        """Look up the weight's rows and what is beside them."""
        found = self.rows(self.held(self.weight), tokens)
        return found if self.beside is None else self.beside(self, tokens, marks, found)

    def rows(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Look up the tokens in a table (vocab, width); zeros for rows that other ranks have."""
        return look_up(table, tokens)

    def held(self, parameter: Tensor) -> Tensor:
        """Return what this rank has of a parameter of this module."""
        return parameter

    def once(self, tensor: Tensor) -> Tensor:
        """Return what only one of the ranks whose results are summed may add."""
        return tensor
