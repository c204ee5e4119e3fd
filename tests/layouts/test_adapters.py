"""Every kind of adapter and every form of LoRA trains the same run on any layout as in one process.

The plain form over the whole matrix of layouts is in test_adapter_layouts.py. All runs here have documents and
accumulate; those of one number of ranks are trained by the same processes.
"""

import functools
from typing import Any

import pytest
import torch

from configs.schema import Config
from tests.training import Trained, assert_same, layout_config, train_each

BIASES = {"num_layers": 2, "attention_bias": True, "mlp_bias": True}
TIED = BIASES | {"tie_embeddings": True}
WIDE = {"num_layers": 2, "dim": 64, "num_heads": 4, "head_dim": 32, "ffn_dim": 128}  # 64 inputs share a scale of NF4
LORA = {"kind": "lora", "rank": 4}

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": (BIASES, LORA | {"rslora": True}),
    "dora": (BIASES, LORA | {"dora": True}),
    "dora nf4": (WIDE, LORA | {"dora": True, "quantization": "nf4"}),
    "int8": (BIASES, LORA | {"quantization": "int8"}),
    "float8": (BIASES, LORA | {"quantization": "float8", "dora": True}),
    "lora+": (BIASES, LORA | {"lora_plus_ratio": 4.0, "targets": ["q_proj", "embed_tokens"]}),
    "biases": (BIASES, LORA | {"bias": "lora_only", "targets": ["k_proj", "o_proj", "down_proj"]}),
    "ranks": (
        BIASES,
        LORA | {"overrides": [{"targets": ["q_proj"], "rank": 2}, {"targets": ["layers.1.mlp.*"], "rank": 3}]},
    ),
    "dropout": (BIASES, LORA | {"dropout": 0.3, "targets": ["all-linear", "lm_head"]}),
    "dora dropout": (BIASES, LORA | {"dropout": 0.3, "dora": True}),
    "tied": (TIED, LORA),
    "bottleneck": (BIASES, {"kind": "bottleneck", "bottleneck_dim": 3}),
    "bottleneck nf4": (WIDE, {"kind": "bottleneck", "bottleneck_dim": 3, "quantization": "nf4"}),
    "prefix": (BIASES, {"kind": "prefix", "num_virtual_tokens": 3}),
    "prompt": (BIASES, {"kind": "prompt", "num_virtual_tokens": 3}),
    "bitfit": (BIASES, {"kind": "bitfit"}),
    "last layer": (BIASES, {"kind": "freeze", "last_layers": 1}),
    "some": (BIASES, {"kind": "freeze", "trainable": ["embed_tokens.*", "lm_head.*", "layers.0.mlp.*"]}),
    "tied embedding": (TIED, {"kind": "freeze", "trainable": ["embed_tokens.*"]}),
}
"""(model, adapter)."""

TWO: list[tuple[str, dict[str, Any], str]] = [
    *((form, {"tp": 2}, "sharded") for form in FORMS),
    *((form, {"pp": 2}, "sharded") for form in ("prompt", "bitfit", "last layer", "tied", "tied embedding")),
    *((form, {"pp": 2}, "replicated") for form in ("dropout", "prefix")),
    *((form, {"cp": 2}, "sharded") for form in ("dropout", "dora", "prefix", "prompt")),
    *((form, {"dp_shard": 2}, "replicated") for form in ("bottleneck", "lora+", "biases", "dora nf4", "tied")),
    *((form, {"dp_shard": 2}, "sharded") for form in ("bitfit", "some", "tied embedding")),
]
ONCE = {
    *(
        name
        for name in ("rslora tp2", "int8 tp2", "ranks tp2", "dropout tp2", "dora dropout tp2", "tied tp2", "prefix tp2")
    ),
    *("bottleneck nf4 tp2", "float8 tp2", "biases tp2", "prompt pp2", "bitfit pp2", "last layer pp2", "dora cp2"),
    *("prefix cp2", "bottleneck dp_shard2", "lora+ dp_shard2", "dora nf4 dp_shard2", "some dp_shard2"),
    "tied embedding dp_shard2",
}
"""Each form once, and each axis."""
FOUR: list[tuple[str, dict[str, Any], str]] = [
    *((form, {"tp": 4}, "sharded") for form in ("dora dropout", "int8", "prefix", "bitfit")),  # of 2 KV heads
    *((form, {"dp_shard": 2, "tp": 2}, "replicated") for form in ("dora nf4", "prompt", "bottleneck")),
]


def config_for(form: str, parallel: dict[str, Any], base: str = "sharded", **sections: dict[str, Any]) -> Config:
    model, adapter = FORMS[form]
    # Of virtual tokens every document needs its own.
    packing = {"packing": "best_fit"} if "num_virtual_tokens" in adapter else {}
    given = {"model": model, "data": {"micro_batch_size": 3} | packing, "parallel": parallel} | sections
    return layout_config(3, adapter=adapter | {"base": base}, **given)


def name_of(form: str, parallel: dict[str, Any], base: str) -> str:
    return " ".join([form, *(f"{axis}{degree}" for axis, degree in parallel.items()), base])


@functools.cache
def one_process() -> dict[str, Trained]:
    return train_each(1, {form: config_for(form, {}) for form in FORMS}, documents=True)


def is_long(name: str) -> bool:
    return name.rpartition(" ")[0] not in ONCE


@functools.cache
def trained(n: int, long: bool) -> dict[str, Trained]:
    cases = {2: TWO, 4: FOUR}[n]
    chosen = {name_of(*case): config_for(*case) for case in cases if is_long(name_of(*case)) == long}
    return train_each(n, chosen, documents=True)


@pytest.mark.parametrize(
    ("n", "form", "name"),
    [
        pytest.param(
            n, case[0], name_of(*case), id=name_of(*case), marks=[pytest.mark.long] if is_long(name_of(*case)) else []
        )
        for n, cases in ((2, TWO), (4, FOUR))
        for case in cases
    ],
)
def test_an_adapter_trains_the_same_run_on_any_layout(n: int, form: str, name: str) -> None:
    assert_same(trained(n, is_long(name))[name], one_process()[form], 1e-10)


def test_each_form_trains_what_it_names_and_learns_another_way() -> None:
    runs = one_process()
    assert len({tuple(run.losses) for run in runs.values()}) == len(FORMS)
    for form, run in runs.items():
        assert all(grad.norm() > 0 for name, grad in run.grads.items() if "k_proj.bias" not in name), form
    kinds = {form: {name.split(".")[-1] for name in runs[form].grads} for form in FORMS}
    assert kinds["bitfit"] == {"bias"} and len(runs["bitfit"].grads) == 2 * 7
    assert kinds["prompt"] == {"prompt_embeddings"} and kinds["prefix"] == {"prefix_tokens"}
    assert set(runs["tied embedding"].grads) == {"embed_tokens.weight"}
    assert {name for name in runs["last layer"].grads if not name.startswith("layers.1.")} == {"norm.weight"}
    assert kinds["dora"] == {"weight", "lora_magnitude_vector"} and kinds["biases"] == {"weight", "bias"}
    shapes = {grad.shape[0] for name, grad in runs["ranks"].grads.items() if "lora_A" in name}
    assert shapes == {2, 3, 4}


def test_dropped_inputs_are_the_same_when_computed_again_and_others_at_each_step() -> None:
    """Masks are a function of the position in the run: recompute, or a microbatch of another size, changes nothing."""
    again = {
        mode: config_for("dropout", {}, recompute={"mode": mode}, data={"micro_batch_size": 4})
        for mode in ("full", "selective")
    }
    for found in train_each(1, again, documents=True).values():
        assert_same(found, one_process()["dropout"], 1e-12)
    without = layout_config(3, model=BIASES, adapter=LORA | {"targets": ["all-linear", "lm_head"]})
    plain = train_each(1, {"": without}, documents=True)[""]
    dropped = one_process()["dropout"]
    # What is held out is read without dropout.
    assert dropped.heldout == pytest.approx(plain.heldout, rel=1e-12)
    assert dropped.losses[0] != pytest.approx(plain.losses[0], rel=1e-6)


def test_recompute_trains_the_same_bits_though_the_embedding_is_frozen() -> None:
    """Reentrant recompute trains nothing where no input of a block asks for a gradient."""
    configs = {
        f"{form} {mode}": config_for(form, {}, recompute={"mode": mode})
        for form in ("rslora", "prefix", "dora nf4")
        for mode in ("full", "selective")
    }
    for name, found in train_each(1, configs, documents=True).items():
        truth = one_process()[name.rpartition(" ")[0]]
        assert found.losses == truth.losses
        assert any(part.startswith("layers.0.") for part in found.grads), "the first block has gradients"
        for part in ("grads", "weights"):
            mine, theirs = getattr(found, part), getattr(truth, part)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
