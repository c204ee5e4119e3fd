"""State that several ranks hold, compared: a copy that has drifted would be trained on, and saved, without a word.

Replicas of HSDP, norms that ranks of tp share, adapters' copies, both ends of a tied weight, and the optimizer's
moments of these. Each copy is hashed where it lies, in integers over its raw bits: the sum of 64-bit words, each times
an odd number of its own place, modulo 2^64. An odd number has an inverse, so one changed word always changes the sum.
Ranks then tell each other one number for all that the same ranks hold together; only when those differ do they ask
which parameter it is. What a single rank holds is neither hashed nor told.
"""

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import ReplicaError, problem
from engine.checkpoint.state import Box, held_boxes, saved_tensors

CHUNK = 1 << 20
"""Words hashed at once: bounds the memory of a comparison to a few times 8 MiB."""
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed word: Knuth's multiplicative hash


@dataclass(frozen=True, slots=True)
class Drift:
    """A parameter, or state of one, whose copies differ."""

    name: str
    ranks: list[int]
    """Whose copies differ from those of most ranks; all that hold one where most don't agree."""
    holders: list[int]
    """All ranks that hold a copy."""
    hosts: list[str]
    """Of `ranks`."""

    def error(self, step: int, checked_step: int, others: int) -> ReplicaError:
        """Say who differs, after `step`; `others` more parameters have drifted as well."""
        each = [f"{rank} on {host}" for rank, host in zip(self.ranks, self.hosts, strict=True)]
        where = f"{'rank' if len(each) == 1 else 'ranks'} {', '.join(each)}"
        right = [rank for rank in self.holders if rank not in self.ranks]
        with_whom = f"from the copies of ranks {', '.join(map(str, right))}" if right else "from one another"
        more = f", and so do {others} more" if others else ""
        since = f"since the last check at step {checked_step}"
        expected = f"{self.name} differs {with_whom}{more}, after step {step}, {since}"
        why = "a bit has changed in memory or on the way, or copies were updated differently"
        do = (
            "Nothing was saved of it; the same command goes on from the last checkpoint. When it happens again on the "
            "same host, take that out of the job."
        )
        return ReplicaError(problem(where, "", expected, why, do))


class Replicas:
    """Compares what ranks hold copies of; every method is collective over the ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Compare over a gloo group; None is a single process, with nothing to compare."""
        self._group = group
        self._shared: _Shared | None = None
        self._multipliers: dict[torch.device, Tensor] = {}
        self.checked_step = 0
        """Step of the last comparison, or of the checkpoint that the ranks began from."""

    def compare(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> list[Drift]:
        """Compare after `step`; return what has drifted, the same on every rank."""
        if self._group is None:
            return []
        boxes = held_boxes(saved_tensors(model, optimizer))
        if self._shared is None:  # found once: the optimizer's state is there after the first step
            self._shared = _Shared.find(sorted(boxes), self._group)
        digests = self._digests([boxes[box] for box in self._shared.mine])
        summaries = _gather(self._shared.summary(digests), self._group)
        if self._shared.agree(summaries):
            self.checked_step = step
            return []
        # Gone wrong, so what it costs to find out where is no matter; all ranks saw the same and come here.
        return self._shared.drifts(_gather(digests.tolist(), self._group), self._group)

    def _digests(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hash each tensor; one transfer from each device."""
        hashed: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for index, tensor in enumerate(tensors):
            hashed.setdefault(tensor.device, []).append((index, self._digest(tensor)))
        digests = torch.zeros(len(tensors), dtype=torch.int64)
        for entries in hashed.values():
            places = torch.tensor([index for index, _ in entries])
            digests[places] = torch.stack([digest for _, digest in entries]).cpu()
        return digests

    def _digest(self, tensor: Tensor) -> Tensor:
        """Hash a tensor's raw bits, (); int64 arithmetic wraps, which is the modulus."""
        data = tensor.contiguous().view(-1).view(torch.uint8)
        whole = data.numel() // 8 * 8
        words, rest = data[:whole], data[whole:]
        if words.storage_offset() % 8:
            words = words.clone()
        chunks = list(words.view(torch.int64).split(CHUNK)) if whole else []
        if rest.numel():
            chunks.append(F.pad(rest, (0, 8 - rest.numel())).view(torch.int64))
        digest = torch.zeros((), dtype=torch.int64, device=data.device)
        for chunk in chunks:
            multipliers = self._multipliers_on(data.device)[: chunk.numel()]
            digest = digest * _GOLDEN + (chunk * multipliers).sum()
        return digest

    def _multipliers_on(self, device: torch.device) -> Tensor:
        """An odd number for each place of a chunk."""
        if device not in self._multipliers:
            self._multipliers[device] = torch.arange(1, CHUNK + 1, device=device) * _GOLDEN | 1
        return self._multipliers[device]


@dataclass(frozen=True, slots=True)
class _Shared:
    """What this rank holds copies of, and who else does."""

    mine: list[Box]
    """This rank's shared boxes, in the order in which it tells of them."""
    tables: list[list[int]]
    """Of each rank, the keys of its shared boxes in that order."""
    holders: dict[int, tuple[int, ...]]
    """Who holds the box of a key."""
    sets: list[list[tuple[int, ...]]]
    """Of each rank, the sets of ranks that it shares something with."""
    index: int

    @classmethod
    def find(cls, boxes: Sequence[Box], group: dist.ProcessGroup) -> "_Shared":
        """Find what other ranks hold too."""
        keys = [_key(box) for box in boxes]
        everyone = _gather(keys, group)
        holders: dict[int, list[int]] = {}
        for rank, held in enumerate(everyone):
            for key in held:
                holders.setdefault(key, []).append(rank)
        shared = {key: tuple(ranks) for key, ranks in holders.items() if len(ranks) > 1}
        tables = [[key for key in held if key in shared] for held in everyone]
        return cls(
            mine=[box for box, key in zip(boxes, keys, strict=True) if key in shared],
            tables=tables,
            holders=shared,
            sets=[sorted({shared[key] for key in table}) for table in tables],
            index=dist.get_rank(group),
        )

    def summary(self, digests: Tensor) -> list[int]:
        """Make one number of all that this rank shares with the same ranks, for each such set of ranks."""
        sets = self.sets[self.index]
        of_set = torch.tensor([sets.index(self.holders[key]) for key in self.tables[self.index]], dtype=torch.int64)
        odd = torch.arange(1, len(digests) + 1) * _GOLDEN | 1
        return [int((digests * odd)[of_set == place].sum()) for place in range(len(sets))]

    def agree(self, summaries: Sequence[Sequence[int]]) -> bool:
        """Say whether all ranks of each set told the same number."""
        seen: dict[tuple[int, ...], int] = {}
        each = zip(self.sets, summaries, strict=True)
        told = [pair for sets, numbers in each for pair in zip(sets, numbers, strict=True)]
        return all(seen.setdefault(ranks, number) == number for ranks, number in told)

    def drifts(self, digests: Sequence[Sequence[int]], group: dist.ProcessGroup) -> list[Drift]:
        """Find which copies differ, by the digests of each rank in the order of its table."""
        values: dict[int, dict[int, int]] = {}
        for rank, (table, told) in enumerate(zip(self.tables, digests, strict=True)):
            for key, digest in zip(table, told, strict=True):
                values.setdefault(key, {})[rank] = digest
        differing = {key: copies for key, copies in values.items() if len(set(copies.values())) > 1}
        mine = {_key(box): box[0] for box in self.mine}
        here = {"host": socket.gethostname(), "names": {str(key): mine[key] for key in differing if key in mine}}
        everyone = [json.loads(bytes(text)) for text in _gather(list(json.dumps(here).encode()), group)]
        names = {int(key): name for one in everyone for key, name in one["names"].items()}
        found = []
        for key, copies in differing.items():
            value, count = Counter(copies.values()).most_common(1)[0]
            wrong = [rank for rank, digest in copies.items() if digest != value or 2 * count <= len(copies)]
            found.append(Drift(names[key], wrong, list(copies), [everyone[rank]["host"] for rank in wrong]))
        return sorted(found, key=lambda one: (not one.name.startswith("model."), one.name))


def _key(box: Box) -> int:
    """A number for a box, the same on every rank."""
    return int.from_bytes(hashlib.sha256(json.dumps(box).encode()).digest()[:8], "big", signed=True)


def _gather(values: Sequence[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Return the numbers of all ranks, in rank order; each may have another count of them."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(values)]), group=group)
    longest = max(int(count) for count in counts)
    if not longest:
        return [[] for _ in counts]
    padded = torch.tensor([*values, *[0] * (longest - len(values))], dtype=torch.int64)
    told = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(told, padded, group=group)
    return [row[: int(count)].tolist() for row, count in zip(told, counts, strict=True)]
