"""Every layout equals one process: losses, held-out loss, gradients of the first step, weights after the third."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.training import Trained, assert_same, layout_config, train_on

# Degrees that make two ranks, and a third axis to put beside two others.
AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp")


@functools.cache
def one_process(documents: bool, tied: bool, compute: str = "fp64", layers: int = 2) -> Trained:
    return train_on(1, config_for({}, tied, compute, layers=layers), documents)


def layers_for(parallel: Mapping[str, Any]) -> int:
    return max(2, parallel.get("pp", 1))


def config_for(
    parallel: dict[str, Any], tied: bool, compute: str = "fp64", layers: int = 0, **sections: dict[str, Any]
) -> Any:
    precision = {"compute": compute, "master": "fp64" if compute == "fp64" else "fp32"}
    model: dict[str, Any] = {"tie_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    model["num_layers"] = layers or layers_for(parallel)
    return layout_config(3, model=model, precision=precision, parallel=parallel, **sections)


def ranks_of(parallel: dict[str, Any]) -> int:
    n = 1
    for axis in AXES:
        n *= parallel.get(axis, 1)
    return n


def named(layouts: Sequence[Mapping[str, Any]], long: Sequence[Mapping[str, Any]] = ()) -> list[Any]:
    """Name them; those in `long` repeat what others show already."""
    return [
        pytest.param(
            one,
            id=" ".join(f"{axis}{degree}" for axis, degree in one.items()),
            marks=[pytest.mark.long] if one in long else [],
        )
        for one in layouts
    ]


ALONE: list[dict[str, Any]] = [{axis: degree} for axis in AXES for degree in (2, 4)]
PAIRS: list[dict[str, Any]] = [dict.fromkeys(pair, 2) for pair in itertools.combinations(AXES, 2)]
TRIPLES = [
    {"dp_shard": 2, "tp": 2, "pp": 2},
    {"dp_shard": 2, "cp": 2, "tp": 2},
    {"cp": 2, "tp": 2, "pp": 2},
    {"dp_replicate": 2, "dp_shard": 2, "pp": 2},
]


MEETING = [
    dict.fromkeys(pair, 2) for pair in (("dp_replicate", "dp_shard"), ("dp_shard", "tp"), ("cp", "tp"), ("cp", "pp"))
]
"""Pairs that show what others repeat, beside a triple of each kind below."""


@pytest.mark.parametrize(
    "parallel",
    named(
        ALONE + PAIRS, long=[one for one in ALONE + PAIRS if 4 in one.values() or (len(one) > 1 and one not in MEETING)]
    ),
)
def test_a_layout_equals_one_process(parallel: dict[str, Any]) -> None:
    found = train_on(ranks_of(parallel), config_for(parallel, tied=False, data={"micro_batch_size": 3}))
    assert_same(found, one_process(documents=False, tied=False, layers=layers_for(parallel)), 1e-10)


@pytest.mark.parametrize(
    "parallel",
    named(
        [one for one in ALONE if 2 in one.values()] + TRIPLES,
        long=[{"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}, {"pp": 2}, *TRIPLES[1:]],
    ),
)
def test_documents_with_unequal_targets_stay_what_they_are(parallel: dict[str, Any]) -> None:
    tied = "pp" in parallel
    found = train_on(ranks_of(parallel), config_for(parallel, tied, data={"micro_batch_size": 1}), documents=True)
    assert_same(found, one_process(documents=True, tied=tied), 1e-10)


@pytest.mark.parametrize(
    ("mode", "parallel"),
    [
        pytest.param(mode, layout, marks=[pytest.mark.long] if repeats else [])
        for mode, layout, repeats in [
            ("full", {}, False),
            ("selective", {}, False),
            ("full", {"dp_shard": 2, "tp": 2}, True),
            ("selective", {"dp_shard": 2, "tp": 2}, False),
            ("full", {"cp": 2, "pp": 2}, False),
            ("selective", {"cp": 2, "pp": 2}, True),
        ]
    ],
)
def test_recompute_changes_nothing(mode: str, parallel: dict[str, Any]) -> None:
    sections = {"recompute": {"mode": mode, "every_blocks": 2}, "data": {"micro_batch_size": 3}}
    found = train_on(ranks_of(parallel), config_for(parallel, False, **sections))
    assert_same(found, one_process(documents=False, tied=False), 1e-10)


@pytest.mark.parametrize(
    "parallel",
    named(
        [{"dp_shard": 2}, {"dp_shard": 2, "pp": 2}, {"dp_replicate": 2, "tp": 2}], long=[{"dp_replicate": 2, "tp": 2}]
    ),
)
def test_unsharded_accumulation_changes_nothing(parallel: dict[str, Any]) -> None:
    parallel = parallel | {"accumulate": "unsharded", "reshard_after_forward": False}
    found = train_on(ranks_of(parallel), config_for(parallel, False, data={"micro_batch_size": 2}))
    assert_same(found, one_process(documents=False, tied=False), 1e-10)


@pytest.mark.parametrize(("compute", "bound"), [pytest.param("fp32", 1e-4, marks=pytest.mark.long), ("bf16", 5e-2)])
@pytest.mark.parametrize(
    "parallel", named([{axis: 2} for axis in AXES], long=[{"dp_replicate": 2}, {"dp_shard": 2}, {"pp": 2}])
)
def test_lower_precision_stays_near_one_process(parallel: dict[str, Any], compute: str, bound: float) -> None:
    """Losses and norms only: in bf16 single gradients differ by what bf16 rounds."""
    found = train_on(2, config_for(parallel, False, compute, data={"micro_batch_size": 3}))
    truth = one_process(documents=False, tied=False, compute=compute)
    for mine, theirs in zip(found.losses + found.norms, truth.losses + truth.norms, strict=True):
        assert abs(mine - theirs) <= bound * abs(theirs)
