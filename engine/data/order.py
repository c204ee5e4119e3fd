"""A seeded permutation of 0..n-1 that takes no memory: a Feistel network with cycle walking.

A shuffled array of a trillion-token corpus would take gigabytes on every rank; here the i-th sample of an epoch is
computed. A Feistel network is a bijection whatever its round function is, so the order can't miss or repeat a sample.
It works on numbers of an even count of bits; a result past the end is fed in again until it lands below n ("Ciphers
with Arbitrary Finite Domains", Black and Rogaway 2002), on average less than four times.
"""

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64's finaliser


def permute(index: npt.ArrayLike, size: int, key: tuple[int, ...], number: npt.ArrayLike = 0) -> npt.NDArray[np.int64]:
    """Return where permutations of range(size) send the elements of `index` (n).

    Every key is a family of permutations, and `number` (one, or one an element) chooses among them: an epoch, say.
    """
    values = np.atleast_1d(np.asarray(index, dtype=np.int64))
    assert 1 <= size < 1 << 62, f"a permutation of {size} elements"
    assert values.size == 0 or (values.min() >= 0 and values.max() < size), f"index outside of 0..{size - 1}"
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key, size, np.broadcast_to(np.asarray(number, dtype=np.uint64), values.shape))
    result = _feistel(values.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(result >= np.uint64(size))
    while outside.size:
        result[outside] = _feistel(result[outside], half_bits, round_keys[:, outside])
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)


def _round_keys(key: tuple[int, ...], size: int, number: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return (rounds, n) keys; hashed, so that seeds 0 and 1 or neighbouring epochs have nothing in common."""
    text = ",".join(str(part) for part in (*key, size))
    digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS, person=b"ropewalk-order").digest()
    return _scramble(number, np.frombuffer(digest, dtype="<u8")[:, None])


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """One pass over numbers of 2 * half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_scramble(right, round_key) & mask)
    return (left << shift) | right


def _scramble(values: npt.NDArray[np.uint64], round_key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser over value + key; arrays wrap modulo 2**64 without a warning."""
    mixed = values + round_key
    for multiplier, shift in zip(_MULTIPLIERS, (np.uint64(30), np.uint64(27)), strict=True):
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return mixed ^ (mixed >> np.uint64(31))
