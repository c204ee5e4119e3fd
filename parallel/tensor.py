"""Tensor and sequence parallelism: which rank of "tp" holds which part of a matrix, and what that has a block compute.

    x (batch, seq/tp, dim) -> norm -> gather seq -> q, k, v, gate, up by columns -> o, down by rows -> sum, scatter seq

One table names every module. Parameters are DTensors over the mesh's "tp" axis, so that FSDP, checkpoints and the
gradient norm know the whole; activations are plain tensors, and the collectives are written out: two all-gathers and
two reduce-scatters a block, and as many in its backward. A parameter that every rank holds whole sees a part of the
tokens or of the heads on each, so its gradient is a partial sum, which FSDP adds up. Nothing here knows of FSDP.

Sources: arXiv:1909.08053 (Megatron-LM), arXiv:2205.05198 section 4.2 (sequence parallelism).
"""

import warnings
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from configs.schema import ModelConfig
from models.linear import Embedding, Linear, Marks
from models.llama import Attention, FeedForward, LayerCache, Llama, RMSNorm, rms_norm


class Ranks(NamedTuple):
    """The ranks of a tp group as the computing needs them: constants of a compiled graph."""

    group: str
    """Name of the process group."""
    size: int
    index: int
    """This rank's place."""


class VocabularyShard(NamedTuple):
    """The rows of the vocabulary that this rank's part of the head has."""

    first: int
    group: str
    """Name of the process group whose ranks have the others."""


def split_tensors(model: Llama, mesh: DeviceMesh) -> None:
    """Split a model, or a pipeline's stage, on the meta device over a mesh of one axis, "tp"; in place.

    The degree divides num_heads, ffn_dim, vocab_size and the length of every sequence, and divides num_kv_heads or is a
    multiple of it. Modules become a subclass of what they were.
    """
    if mesh.size() == 1:
        return
    ranks = Ranks(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    _check(model.config, ranks.size)
    plan = PLAN | (MORE_RANKS_THAN_KV_HEADS if model.config.num_kv_heads % ranks.size else {})
    split: dict[nn.Parameter, nn.Parameter] = {}  # tied modules keep one parameter
    for name, module in _planned(model):
        found = [style for pattern, style in plan.items() if fnmatchcase(name, pattern)]
        own = dict(module.named_parameters(recurse=hasattr(module, "sides")))
        assert found or not own, f"{name} has parameters and no line in the plan"
        for style in found:
            if type(module) in style.kinds:
                module.__class__ = style.kinds[type(module)]
                module.tp = ranks  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            if isinstance(module, SharedKeys):
                module.num_kv_heads = model.config.num_kv_heads
            for key, parameter in own.items():
                if parameter not in split:
                    split[parameter] = _part(parameter, mesh, _placement(module, key, style))
                holder, _, last = key.rpartition(".")
                module.get_submodule(holder).register_parameter(last, split[parameter])


def _planned(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules that the plan speaks of: what lies below a projection follows the projection."""
    owners = [f"{name}." for name, module in model.named_modules() if hasattr(module, "sides")]
    return [(name, part) for name, part in model.named_modules() if not name.startswith(tuple(owners))]


def _placement(module: nn.Module, key: str, style: "Style") -> Placement:
    """Give a parameter's placement; that of an adapter or of codes follows from the plan's line for the weight.

    The side of the projection that the plan shards is sharded, whatever follows it; all else is replicated.
    """
    if not isinstance(module, Linear | Embedding) or key in style.placements:
        return style.placements[key]
    weight = style.placements["weight"]
    sharded = module.sides["weight"][weight.dim] if isinstance(weight, Shard) else None
    sides = module.sides[key]
    return Shard(sides.index(sharded)) if sharded in sides and sharded is not None else Replicate()


def vocabulary_shard(weight: Tensor) -> tuple[Tensor, VocabularyShard | None]:
    """Return this rank's rows of the head and which they are; a plain weight has all, and no shard."""
    if not isinstance(weight, DTensor):
        return weight, None
    mesh = weight.device_mesh
    split = (mesh.mesh_dim_names, weight.placements)
    assert split == (("tp",), (Shard(0),)), f"the head is gathered but for its rows over tp, not {split}"
    rows = weight.to_local(grad_placements=weight.placements)
    return rows, VocabularyShard(mesh.get_local_rank() * rows.shape[0], mesh.get_group().group_name)


def enable_async_tp(mesh: DeviceMesh) -> None:
    """Have the compiler split each collective and its matrix product into pieces that overlap; on GPUs with NVLink."""
    from torch._inductor import config
    from torch.distributed import _symmetric_memory

    config._micro_pipeline_tp = True  # pyright: ignore[reportPrivateUsage]
    with warnings.catch_warnings():
        # torch 2.13 calls it needless, yet its pass skips every group that it wasn't called for, without a word.
        warnings.simplefilter("ignore", FutureWarning)
        _symmetric_memory.enable_symm_mem_for_group(mesh.get_group().group_name)


def _check(config: ModelConfig, tp: int) -> None:
    """Hold what configs/layout.py refuses with the degrees that work."""
    for name in ("num_heads", "ffn_dim", "vocab_size"):
        assert getattr(config, name) % tp == 0, f"tp = {tp} must divide model.{name} = {getattr(config, name)}"
    heads = config.num_kv_heads
    assert heads % tp == 0 or tp % heads == 0, f"tp = {tp} must divide {heads} KV heads or be a multiple of them"


def _part(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """Make the DTensor of a parameter on the meta device: shapes only, nothing is sent."""
    shape = list(parameter.shape)
    if isinstance(placement, Shard):
        assert shape[placement.dim] % mesh.size() == 0, f"{shape} by {placement} over {mesh.size()} ranks"
        shape[placement.dim] //= mesh.size()
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    whole = DTensor.from_local(local, mesh, [placement], run_check=False)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


# The collectives. Operators and not torch's wrappers, whose names differ between releases; the compiler's overlapping
# of them with matrix products looks for exactly these, with split and cat around them.


def _gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """(batch, seq/tp, ...) of each rank to (batch, seq, ...)."""
    ops = torch.ops._c10d_functional
    out = ops.wait_tensor(ops.all_gather_into_tensor(x.contiguous(), ranks.size, ranks.group))
    return torch.cat(out.chunk(ranks.size), dim=1)


def _scattered(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks of (batch, seq, ...), to each its part (batch, seq/tp, ...)."""
    assert x.shape[1] % ranks.size == 0, f"{x.shape[1]} positions over {ranks.size} ranks of tp"
    ops = torch.ops._c10d_functional
    parts = torch.cat(x.chunk(ranks.size, dim=1))
    return ops.wait_tensor(ops.reduce_scatter_tensor(parts, "sum", ranks.size, ranks.group))


class _Gather(torch.autograd.Function):
    """All positions from each rank's own; gradients are summed over the ranks, each gets its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _gathered(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _scattered(grad, ctx.ranks), None


class _Scatter(torch.autograd.Function):
    """Each rank's own positions of the sum over the ranks; gradients are gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _scattered(x, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return _gathered(grad, ctx.ranks), None


def gather_sequence(x: Tensor, ranks: Ranks) -> Tensor:
    """(batch, seq/tp, dim) to (batch, seq, dim)."""
    return _Gather.apply(x, ranks)  # pyright: ignore[reportReturnType]


def scatter_sequence(x: Tensor, ranks: Ranks) -> Tensor:
    """Partial sums (batch, seq, dim) to the sum's (batch, seq/tp, dim)."""
    return _Scatter.apply(x, ranks)  # pyright: ignore[reportReturnType]


def _local(parameter: Tensor) -> Tensor:
    """This rank's part; the gradient of a part is a part, and that of a replica a partial sum."""
    weight = cast(DTensor, parameter)
    (placement,) = weight.placements
    return weight.to_local(grad_placements=[placement if isinstance(placement, Shard) else Partial()])


class _LookUp(torch.autograd.Function):
    """Rows of this rank's part of a table, zeros for tokens of the others; gradients are added up in at least fp32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, first: int) -> Tensor:
        row = tokens - first
        outside = (row < 0) | (row >= weight.shape[0])
        row = torch.where(outside, 0, row)
        ctx.save_for_backward(row, outside)
        ctx.rows, ctx.dtype = weight.shape[0], weight.dtype
        return F.embedding(row, weight).masked_fill(outside[..., None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        row, outside = ctx.saved_tensors
        precise = grad.to(torch.promote_types(grad.dtype, torch.float32)).masked_fill(outside[..., None], 0)
        summed = torch.ops.aten.embedding_dense_backward(precise, row, ctx.rows, -1, False)
        return summed.to(ctx.dtype), None, None


class VocabularyEmbedding(Embedding):
    """The look-up in a part of the rows."""

    tp: Ranks

    def forward(self, input: Tensor, marks: Marks | None = None) -> Tensor:
        """(batch, seq) to (batch, seq/tp, dim)."""
        return scatter_sequence(self.added_up(input, marks), self.tp)

    def rows(self, table: Tensor, tokens: Tensor) -> Tensor:
        """(batch, seq) to (batch, seq, width), zeros for the rows of other ranks."""
        return _LookUp.apply(table, tokens, self.tp.index * table.shape[0])  # pyright: ignore[reportReturnType]

    def held(self, parameter: Tensor) -> Tensor:
        """Return this rank's part."""
        return _local(parameter)

    def once(self, tensor: Tensor) -> Tensor:
        """Leave it to the first rank: what is found is summed over all."""
        return tensor if self.tp.index == 0 else tensor * 0


class SequenceNorm(RMSNorm):
    """The norm of this rank's positions."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq/tp, dim) to the same."""
        return rms_norm(x, _local(self.weight), self.eps)


class FinalNorm(SequenceNorm):
    """The last norm: the head, split by the vocabulary, reads all positions."""

    tp: Ranks

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seq/tp, dim) to (batch, seq, dim)."""
        return gather_sequence(super().forward(x), self.tp)


class HeadsAttention(Attention):
    """Attention of this rank's heads, from this rank's positions to the same."""

    tp: Ranks

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Tensor | None = None,
        cache: LayerCache | None = None,
        marks: Marks | None = None,
    ) -> Tensor:
        """Gather the positions once, for queries, keys and values."""
        assert cache is None, "generation doesn't run under tp"
        return super().forward(gather_sequence(x, self.tp), cos, sin, documents, None, marks)


class ColumnsFeedForward(FeedForward):
    """The feed-forward with this rank's columns, from this rank's positions to the same."""

    tp: Ranks

    def forward(self, x: Tensor, marks: Marks | None = None) -> Tensor:
        """Gather the positions once, for both factors."""
        return super().forward(gather_sequence(x, self.tp), marks)


class ColumnLinear(Linear):
    """All positions to this rank's part of the outputs: (batch, seq, in) to (batch, seq, out/tp)."""

    tp: Ranks

    def held(self, parameter: Tensor) -> Tensor:
        """Return this rank's part."""
        return _local(parameter)

    def first_output(self, count: int) -> int:
        """Give the number of the first of this rank's outputs."""
        return self.tp.index * count


class SharedKeys(ColumnLinear):
    """Keys or values of the one head that this rank's queries read: more ranks than KV heads hold them all whole."""

    num_kv_heads: int

    def outputs(self, tensor: Tensor) -> Tensor:
        """Pick the head's rows."""
        size = self.out_features // self.num_kv_heads
        first = self.first_output(size)
        return tensor[first : first + size]

    def first_output(self, count: int) -> int:
        """Give the number of the head's first row."""
        return self.tp.index * self.num_kv_heads // self.tp.size * count


class RowLinear(ColumnLinear):
    """This rank's part of the inputs to the sum's positions of this rank: (batch, seq, in/tp) to (batch, seq/tp, out).

    What is beside the weight multiplies the same inputs and joins the one sum.
    """

    def forward(self, input: Tensor, marks: Marks | None = None) -> Tensor:
        """Project, sum over the ranks, and keep this rank's positions."""
        out = scatter_sequence(self.added_up(input, marks, None), self.tp)
        bias = self.own_bias()
        # After the sum: else it would be added once a rank.
        out = out if bias is None else out + bias
        return out if self.after is None else self.after(self, out)

    def summed(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks."""
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(tensor, "sum", self.tp.group))

    def first_input(self, width: int) -> int:
        """Give the number of the first of this rank's inputs."""
        return self.tp.index * width

    def first_output(self, count: int) -> int:
        """Give the number of the first output: all are computed here."""
        return 0


class Style(NamedTuple):
    """What tp does to a module: the class that computes in its place, by its own, and where its parameters go."""

    kinds: dict[type, type]
    placements: dict[str, Placement]


EMBEDDING = Style({Embedding: VocabularyEmbedding}, {"weight": Shard(0)})
NORM = Style({RMSNorm: SequenceNorm}, {"weight": Replicate()})
COLUMN = Style({Linear: ColumnLinear}, {"weight": Shard(0), "bias": Shard(0)})
SHARED = Style({Linear: SharedKeys}, {"weight": Replicate(), "bias": Replicate()})
ROW = Style({Linear: RowLinear}, {"weight": Shard(1), "bias": Replicate()})

PLAN = {
    "embed_tokens": EMBEDDING,
    "layers.*.input_layernorm": NORM,
    "layers.*.self_attn": Style({Attention: HeadsAttention}, {}),
    "layers.*.self_attn.q_proj": COLUMN,
    "layers.*.self_attn.k_proj": COLUMN,
    "layers.*.self_attn.v_proj": COLUMN,
    "layers.*.self_attn.o_proj": ROW,
    "layers.*.post_attention_layernorm": NORM,
    "layers.*.mlp": Style({FeedForward: ColumnsFeedForward}, {}),
    "layers.*.mlp.gate_proj": COLUMN,
    "layers.*.mlp.up_proj": COLUMN,
    "layers.*.mlp.down_proj": ROW,
    "norm": Style({RMSNorm: FinalNorm}, {"weight": Replicate()}),
    # The loss multiplies with its rows, see engine/loss.py.
    "lm_head": Style({Linear: ColumnLinear}, {"weight": Shard(0)}),
}
"""Every module that tp changes, by a pattern of its name."""

MORE_RANKS_THAN_KV_HEADS = {"layers.*.self_attn.k_proj": SHARED, "layers.*.self_attn.v_proj": SHARED}
"""What takes the place of lines of the plan where a KV head has several ranks."""
