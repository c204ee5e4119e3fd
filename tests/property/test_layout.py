"""Ranks and coordinates: every rank has its own place on the mesh, and the axes nest as documented."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.schema import ParallelConfig
from parallel.mesh import AXES, Layout, build_layout


@contextmanager
def as_rank(rank: int, degrees: tuple[int, ...]) -> Iterator[Layout]:
    """Be one rank of a world that isn't there: its process group communicates with nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(degrees))
    try:
        yield build_layout(ParallelConfig(**dict(zip(AXES, degrees, strict=True))), torch.device("cpu"))
    finally:
        dist.destroy_process_group()


DEGREES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=len(AXES), max_size=len(AXES)).filter(
    lambda degrees: prod(degrees) <= 24
)


@settings(max_examples=12, deadline=None)
@given(DEGREES.map(tuple))
def test_ranks_and_coordinates_are_a_bijection_with_the_last_axis_innermost(degrees: tuple[int, ...]) -> None:
    expected = list(itertools.product(*(range(degree) for degree in degrees)))
    found = []
    for rank in range(prod(degrees)):
        with as_rank(rank, degrees) as layout:
            found.append(tuple(layout.index(axis) for axis in AXES))
            assert layout.shape == degrees
            assert layout.dp_rank == layout.index("dp_replicate") * layout.degree("dp_shard") + layout.index("dp_shard")
    assert found == expected


@settings(max_examples=8, deadline=None)
@given(DEGREES.map(tuple), st.integers(0, 10**6))
def test_each_group_holds_the_ranks_that_differ_in_its_axes_only(degrees: tuple[int, ...], number: int) -> None:
    coordinates = list(itertools.product(*(range(degree) for degree in degrees)))
    rank = number % prod(degrees)

    def sharing(*axes: str) -> list[int]:
        fixed = [index for index, axis in enumerate(AXES) if axis not in axes]
        mine = coordinates[rank]
        return [other for other, place in enumerate(coordinates) if all(place[i] == mine[i] for i in fixed)]

    with as_rank(rank, degrees) as layout:
        assert dist.get_process_group_ranks(layout.tokens.get_group()) == sharing("dp_replicate", "dp_shard", "cp")
        assert dist.get_process_group_ranks(layout.losses.get_group()) == sharing(
            "pp", "dp_replicate", "dp_shard", "cp"
        )
        assert dist.get_process_group_ranks(layout.mesh.get_group("tp")) == sharing("tp")
        assert layout.shards.mesh.flatten().tolist() == sharing("dp_replicate", "dp_shard", "cp")
