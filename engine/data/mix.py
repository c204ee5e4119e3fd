"""Several stores mixed by weight: sample i of the run -> (store, sample of that store), by arithmetic.

The run is cut into blocks of equal length. Each block holds the same whole number of samples of each store, and a
permutation seeded by the block decides which slot is whose. So the shares are exact in every block, sample i is found
in O(1), and the samples of a store are numbered 0, 1, 2, .. without a gap, whatever the other stores are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.data.order import permute

MAX_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each store occurs in a block, and the seed of the order within blocks."""

    counts: tuple[int, ...]
    seed: int

    @classmethod
    def from_weights(cls, weights: Sequence[float], seed: int) -> "Mix":
        """Turn weights into whole counts: the shortest block that meets them exactly, else 4096 slots, rounded."""
        for index, weight in enumerate(weights):
            if not (weight > 0 and np.isfinite(weight)):
                where = f"data.stores.{index}.weight"
                raise DataError(problem(where, weight, "must be a positive number", do="Leave out an unused store."))
        if len(weights) > MAX_BLOCK:
            raise DataError(problem("data.stores", len(weights), f"at most {MAX_BLOCK} stores can be mixed"))
        shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
        block = next((size for size in range(1, MAX_BLOCK + 1) if _is_exact(shares * size)), MAX_BLOCK)
        return cls(tuple(apportion(shares, block, at_least=1)), seed)

    def locate(self, samples: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return (store, sample within the store) of each sample of the run; both shaped like `samples`, 1-d."""
        index = np.atleast_1d(np.asarray(samples, dtype=np.int64))
        size = sum(self.counts)
        block, within = np.divmod(index, size)
        slot = permute(within, size, (self.seed,), block)
        ends = np.cumsum(self.counts)
        store = np.searchsorted(ends, slot, side="right")
        counts = np.asarray(self.counts)
        return store, block * counts[store] + slot - (ends - counts)[store]


def apportion(shares: npt.NDArray[np.float64], total: int, at_least: int = 0) -> list[int]:
    """Split `total` into whole parts by largest remainder; ties go to the first. No part is below `at_least`."""
    exact = shares / shares.sum() * total
    counts = np.maximum(np.floor(exact + 1e-9).astype(np.int64), at_least)
    # Raising small stores to `at_least` can overshoot: take it from whoever is furthest above its share.
    while counts.sum() > total:
        counts[int(np.argmax(np.where(counts > at_least, counts - exact, -np.inf)))] -= 1
    while counts.sum() < total:
        counts[int(np.argmax(exact - counts))] += 1
    return [int(count) for count in counts]


def _is_exact(counts: npt.NDArray[np.float64]) -> bool:
    whole = np.rint(counts)
    return bool(np.all(whole >= 1) and np.all(np.abs(counts - whole) < 1e-7))
