"""FlexAttention with a mask of blocks: causal, documents kept apart, queries at the end of the keys.

The mask of blocks is computed from the documents at the blocks' first and last positions, (S / 128) x (S / 128);
torch's own create_block_mask evaluates all S x S pairs. It never waits for the device. GPUs only: torch has no backward
pass for it on CPUs. A leaf of attention.py, which chooses.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


def flex(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """Attend by torch's compiled kernel; within a graph that is being compiled, as a part of it."""
    from torch.nn.attention.flex_attention import flex_attention  # here: it imports the compiler

    kernel = flex_attention if torch.compiler.is_compiling() else _compiled()
    mask = block_mask(q.shape[2], k.shape[2], documents, q.device)
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """Compile the kernel once: uncompiled, flex_attention holds all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def block_mask(q_len: int, k_len: int, documents: Tensor | None, device: torch.device) -> Any:
    """Make the BlockMask of queries that are the last q_len of k_len positions; documents rise along a row."""
    from torch.nn.attention.flex_attention import BlockMask

    before = k_len - q_len

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query + before >= key
        return causal if documents is None else causal & (documents[row, query + before] == documents[row, key])

    query = before + torch.arange(0, q_len, BLOCK, device=device)[:, None]  # first position of each block
    key = torch.arange(0, k_len, BLOCK, device=device)
    query_end, key_end = query + BLOCK - 1, key + BLOCK - 1
    seen = (key <= query_end)[None]
    # A block that reaches over the end of the queries is never whole.
    whole = ((key_end <= query) & (query_end < k_len))[None]
    if documents is not None:
        query_end, key_end = query_end.clamp(max=k_len - 1), key_end.clamp(max=k_len - 1)
        seen = seen & (documents[:, key_end][:, None] >= documents[:, query])
        whole = whole & (documents[:, key][:, None] == documents[:, query_end])
    counts, indices = _ordered(seen & ~whole)
    whole_counts, whole_indices = _ordered(seen & whole)
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(q_len, k_len)
    )


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count and list, first, the chosen key blocks of each query block; (batch or 1, 1, query blocks, ...)."""
    indices = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(dim=-1, dtype=torch.int32)[:, None].contiguous(), indices[:, None].contiguous()
