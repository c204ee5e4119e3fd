"""LoRA: a product of two thin matrices beside a projection (arXiv:2106.09685), with its later forms.

    y = W x + s B A x                       s = alpha / rank, or alpha / sqrt(rank) under rsLoRA (arXiv:2312.03732)
    y = m / |W + s B A| (W x + s B A x)     DoRA (arXiv:2402.09353); | | over the inputs, without a gradient

A follows the projection's inputs and B its outputs, so on any layout the adapter has what its base has and is summed
where its base is summed. Several members are trained at once as one batched product, the rows of a batch being theirs
in equal shares; thinner ones are padded with zeros, whose gradients are zeros.

Dropout's masks are a function of (seed, projection, position in the run, input), so that they are the same on any
layout and when activations are computed again.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.adapters import AdapterConfig
from configs.errors import ConfigError, problem
from models.linear import IN, OUT, Embedding, Linear, Marks

SITE = "lora_site"
"""Buffer of a projection: what tells its masks from those of others, one number a member."""


class Factor(nn.Module):
    """One of the two matrices."""

    def __init__(self, rows: int, columns: int) -> None:
        """Make an unfilled one."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


@dataclass(frozen=True, slots=True)
class Lora:
    """What is computed beside a projection; equal for all projections of equal scale."""

    scales: tuple[float, ...]
    """s of each member."""
    dropout: float
    dora: bool

    def __call__(self, linear: Linear, x: Tensor, marks: Marks | None, bias: Tensor | None) -> Tensor:
        """Return the product of the projection and the adapter with x, plus the bias."""
        if self.dora:
            return self._dora(linear, x, marks, bias)
        out = linear.product(x, bias)
        z, b = self.factors(linear, x, marks)
        # One pass over the outputs: the sum is the product's own start.
        if len(self.scales) == 1:
            return torch.addmm(out.flatten(0, 1), z.flatten(0, 1), b.T).view_as(out)
        members = len(self.scales)
        return torch.baddbmm(out.view(members, -1, out.shape[-1]), z, b.mT).view_as(out)

    def factors(self, linear: Linear, x: Tensor, marks: Marks | None) -> tuple[Tensor, Tensor]:
        """Return s A x and B: (batch, seq, rank) and (out, rank), or (members, tokens, rank) and (members, out, rank).

        A partial sum where this rank has some of the inputs.
        """
        x = self._dropped(linear, x, marks)
        a, b = linear.lora_A, linear.lora_B
        if isinstance(a, Factor) and isinstance(b, Factor):
            (scale,) = self.scales
            return F.linear(x, linear.held(a.weight)) * scale, linear.outputs(linear.held(b.weight))
        assert isinstance(a, nn.ModuleDict) and isinstance(b, nn.ModuleDict), "factors of one or of several members"
        stacked_a = _stacked([linear.held(a[name].weight) for name in a], dim=0)  # pyright: ignore
        stacked_b = _stacked([linear.outputs(linear.held(b[name].weight)) for name in b], dim=1)  # pyright: ignore
        scales = torch.tensor(self.scales, dtype=x.dtype, device=x.device)[:, None, None]
        return torch.bmm(x.view(len(self.scales), -1, x.shape[-1]), stacked_a.mT) * scales, stacked_b

    def _dora(self, linear: Linear, x: Tensor, marks: Marks | None, bias: Tensor | None) -> Tensor:
        (scale,) = self.scales
        a = linear.held(linear.lora_A.weight)  # pyright: ignore
        b = linear.outputs(linear.held(linear.lora_B.weight))  # pyright: ignore
        magnitude = linear.outputs(linear.held(linear.lora_magnitude_vector))  # pyright: ignore
        with torch.no_grad():
            precise = torch.promote_types(x.dtype, torch.float32)
            whole = torch.addmm(linear.dense(precise), b.to(precise), a.to(precise), alpha=scale)
            norm = linear.summed(whole.square().sum(dim=1)).sqrt()
        ratio = (magnitude / norm.to(magnitude.dtype)).to(x.dtype)
        dropped = self._dropped(linear, x, marks)
        out = linear.product(dropped)
        out = torch.addmm(out.flatten(0, 1), F.linear(dropped, a).flatten(0, 1), b.T, alpha=scale).view_as(out) * ratio
        if dropped is not x:  # as PEFT: dropout touches the adapter's part of the output only
            out = out + linear.product(x) - linear.product(dropped)
        return out if bias is None else out + bias

    def _dropped(self, linear: Linear, x: Tensor, marks: Marks | None) -> Tensor:
        if not self.dropout or marks is None or marks.places is None:
            return x
        first = linear.first_input(x.shape[-1])
        keep = kept(marks.places, getattr(linear, SITE), first, x.shape[-1], self.dropout)
        return torch.where(keep, x / (1 - self.dropout), 0)


@dataclass(frozen=True, slots=True)
class LoraRows:
    """What is looked up beside an embedding: s B A e, of which A e is a column of A."""

    scale: float

    def __call__(self, embedding: Embedding, tokens: Tensor, marks: Marks | None, found: Tensor) -> Tensor:
        """Return what is found and the adapter's part."""
        a, b = (embedding.held(getattr(embedding, f"lora_embedding_{name}")) for name in "AB")
        return found + F.linear(embedding.rows(a.T, tokens) * self.scale, b)


Adapted = Mapping[str, tuple[int, float]]
"""Rank and alpha by the name of the module."""


def attach_lora(modules: Mapping[str, nn.Module], members: Sequence[Adapted], config: AdapterConfig) -> None:
    """Put LoRA beside modules, as far as this stage has them; `members` name the same ones."""
    for index, member in enumerate(config.members):
        if hasattr(nn.ModuleDict(), member.name):
            why = "torch's modules have an attribute of that name"
            where = f"adapter.members.{index}.name"
            raise ConfigError(problem(where, member.name, "can't be a member's name", why, "Choose another."))
    for name in members[0]:
        module = modules.get(name)
        of_members = [adapted[name] for adapted in members]
        if isinstance(module, Linear):
            _attach_linear(module, of_members, config)
        elif isinstance(module, Embedding):
            ((rank, alpha),) = of_members
            module.register_parameter("lora_embedding_A", nn.Parameter(torch.empty(rank, module.num_embeddings)))
            module.register_parameter("lora_embedding_B", nn.Parameter(torch.empty(module.embedding_dim, rank)))
            module.sides |= {"lora_embedding_A": (None, IN), "lora_embedding_B": (OUT, None)}
            module.beside = LoraRows(lora_scale(rank, alpha, config))


def _attach_linear(linear: Linear, of_members: Sequence[tuple[int, float]], config: AdapterConfig) -> None:
    a = [Factor(rank, linear.in_features) for rank, _ in of_members]
    b = [Factor(linear.out_features, rank) for rank, _ in of_members]
    names = [member.name for member in config.members]
    linear.lora_A = nn.ModuleDict(dict(zip(names, a, strict=True))) if names else a[0]
    linear.lora_B = nn.ModuleDict(dict(zip(names, b, strict=True))) if names else b[0]
    for below in [f".{name}.weight" for name in names] or [".weight"]:
        linear.sides |= {f"lora_A{below}": (None, IN), f"lora_B{below}": (OUT, None)}
    if config.dora:
        linear.register_parameter("lora_magnitude_vector", nn.Parameter(torch.empty(linear.out_features)))
        linear.sides["lora_magnitude_vector"] = (OUT,)
    if config.dropout:
        linear.register_buffer(SITE, torch.empty(len(a), dtype=torch.int64), persistent=False)
    scales = tuple(lora_scale(rank, alpha, config) for rank, alpha in of_members)
    linear.beside = Lora(scales, config.dropout, config.dora)


def lora_scale(rank: int, alpha: float, config: AdapterConfig) -> float:
    """Give s, which the product of the factors is multiplied with."""
    return alpha / (math.sqrt(rank) if config.rslora else rank)


def _stacked(matrices: Sequence[Tensor], dim: int) -> Tensor:
    """Stack matrices that differ in one dim, padded with zeros."""
    most = max(matrix.shape[dim] for matrix in matrices)

    def padded(matrix: Tensor) -> Tensor:
        missing = most - matrix.shape[dim]
        return F.pad(matrix, (0, missing) if dim == 1 else (0, 0, 0, missing)) if missing else matrix

    return torch.stack([padded(matrix) for matrix in matrices])


# ---- dropout


def site_numbers(seeds: Sequence[int], name: str) -> Tensor:
    """Return what a projection's masks are drawn with, for each member's seed; int64."""
    digests = [hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest() for seed in seeds]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


@torch.library.custom_op("ropewalk::kept", mutates_args=())
def kept(places: Tensor, sites: Tensor, first: int, width: int, rate: float) -> Tensor:
    """Say which inputs first..first+width-1 of each position stay: a share 1 - rate, by an integer hash.

    places (batch, seq) and sites (members) to (batch, seq, width), bool. The hash is murmur3's finaliser in 32 bits, of
    a position's 64-bit one and the input's number. An operator, since the compiler (torch 2.13, CPU) computes other
    masks for widths that don't fill its vectors.
    """
    sites = sites.repeat_interleave(places.shape[0] // sites.shape[0])[:, None]
    place = (places ^ sites) * -7046029254386353131  # 2^64 over the golden ratio: neighbours come far apart
    place = (place ^ ((place >> 32) & 0xFFFFFFFF)).to(torch.int32)
    inputs = torch.arange(first, first + width, device=places.device, dtype=torch.int32) * -1640531527
    h = place[..., None] ^ inputs
    h = (h ^ ((h >> 16) & 0xFFFF)) * -2048144789
    h = (h ^ ((h >> 13) & 0x7FFFF)) * -1028477387
    h = h ^ ((h >> 16) & 0xFFFF)
    return h >= round(rate * 2**32) - 2**31


@kept.register_fake
def _(places: Tensor, sites: Tensor, first: int, width: int, rate: float) -> Tensor:
    return places.new_empty((*places.shape, width), dtype=torch.bool)
