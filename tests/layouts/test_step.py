"""The train step on every data-parallel layout equals a plain loop around Hugging Face's Llama, and one process."""

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from configs.check import resolve
from configs.schema import Config
from engine.data.batches import IGNORE
from engine.weights import starting_weights
from models.hf_config import hf_config
from models.hf_weights import our_name
from models.init import fill_local
from parallel.apply import build_model
from parallel.mesh import build_layout
from tests.ranks import run_ranks
from tests.training import (
    VOCAB,
    Trained,
    assert_same,
    assert_same_tensors,
    global_batch,
    layout_config,
    train_on,
    whole,
)


def a_config(steps: int, **sections: dict[str, Any]) -> Config:
    """Rows that no number of ranks divides, in fp32 unless said."""
    model = {"vocab_size": VOCAB - 1, "num_layers": 2} | sections.pop("model", {})
    return layout_config(steps, model=model, **({"precision": {"compute": "fp32", "master": "fp32"}} | sections))


def huggingface_loop(config: Config) -> Trained:
    """The same training as a person would write it, on one process, with nothing of ours but the initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # here: every rank imports this file

    config = resolve(config, 1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**hf_config(config.model, "float32", None, None)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            fill_local(parameter, config.model, config.run.seed, our_name(name), shape, (0,) * len(shape))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optim = config.optim
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    found = Trained()
    for step in range(config.run.steps):
        batch = global_batch(step, documents=False, vocab_size=config.model.vocab_size)
        logits = model(batch.tokens).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        progress = (step + 1 - 3) / (config.run.steps - 3)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * ((step + 1) / 3 if step < 3 else cosine)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.item())
    found.weights = {our_name(name): p.detach() for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize(
    ("n", "tied"),
    [(1, False), (2, True), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, True), (2, False)))],
)
def test_twenty_steps_equal_a_plain_loop_around_transformers(n: int, tied: bool) -> None:
    config = a_config(20, model={"tie_embeddings": tied})
    found, expected = train_on(n, config), huggingface_loop(config)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_same_tensors("weights", found.weights, expected.weights, 1e-4)


LAYOUTS = {
    "2": (2, {}, 0),
    "3": (3, {}, 0),
    "4": (4, {}, 0),
    "hsdp-2x2": (4, {"dp_replicate": 2}, 0),
    "replicated-3": (3, {"dp_replicate": 3}, 0),
    "accumulate-1": (1, {}, 4),
    "accumulate-2": (2, {}, 2),
    "accumulate-2-unsharded": (2, {"accumulate": "unsharded"}, 2),
    "accumulate-hsdp-2x2": (4, {"dp_replicate": 2}, 1),
    "accumulate-hsdp-2x2-unsharded": (4, {"dp_replicate": 2, "accumulate": "unsharded"}, 1),
    "kept-gathered": (2, {"reshard_after_forward": False}, 3),
}


def fp64_config(tied: bool) -> Config:
    model = {"tie_embeddings": tied, "attention_bias": True}
    return a_config(3, precision={"compute": "fp64", "master": "fp64"}, model=model)


@functools.cache
def one_process(tied: bool) -> Trained:
    return train_on(1, fp64_config(tied))


TIED = ("3", "accumulate-2")
UNTIED = ("2", "hsdp-2x2", "accumulate-1", "accumulate-hsdp-2x2-unsharded")


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        *(pytest.param(layout, False, marks=[] if layout in UNTIED else [pytest.mark.long]) for layout in LAYOUTS),
        *(pytest.param(layout, True, marks=[] if layout in TIED else [pytest.mark.long]) for layout in LAYOUTS),
    ],
)
def test_every_layout_equals_one_process_in_fp64(layout: str, tied: bool) -> None:
    n, parallel, micro_batch_size = LAYOUTS[layout]
    config = fp64_config(tied)
    data = replace(config.data, micro_batch_size=micro_batch_size)
    found = train_on(n, replace(config, parallel=replace(config.parallel, **parallel), data=data))
    assert_same(found, one_process(tied), 1e-10)


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.long), 2])
def test_bf16_compute_stays_near_fp32(n: int) -> None:
    low, high = (
        train_on(n, a_config(10, precision={"compute": compute, "master": "fp32"})) for compute in ("bf16", "fp32")
    )
    assert low.losses == pytest.approx(high.losses, rel=5e-3)
    assert low.losses != high.losses
    assert {weight.dtype for weight in low.weights.values()} == {torch.float32}


def test_the_loss_falls() -> None:
    """Equality alone would hold for two trainings that both learn nothing."""
    found = train_on(2, a_config(20, optim={"lr": 3e-2}), same_batch=True)
    assert found.losses[0] == pytest.approx(math.log(VOCAB - 1), rel=0.02)
    assert found.losses[-1] < 0.8 * found.losses[0]


def test_a_step_without_targets_changes_nothing() -> None:
    config = a_config(3, lr={"schedule": "constant", "warmup_steps": 0})
    found = train_on(2, config, all_ignored_at=2)
    shorter = train_on(2, replace(config, run=replace(config.run, steps=2)))
    assert found.skipped == [0.0, 0.0, 1.0]
    assert found.norms[2] == 0.0
    for name, weight in shorter.weights.items():
        assert torch.equal(found.weights[name], weight), name


@pytest.mark.parametrize("n", [2, 3, 4])
def test_initial_weights_are_the_same_bits_on_any_number_of_ranks(n: int) -> None:
    one, many = (run_ranks(size, initial_weights, a_config(1))[0] for size in (1, n))
    assert one.keys() == many.keys()
    for name, weight in one.items():
        assert torch.equal(weight, many[name]), name


def initial_weights(config: Config) -> dict[str, torch.Tensor]:
    config = resolve(config, dist.get_world_size())
    model = build_model(config, build_layout(config.parallel, torch.device("cpu")), starting_weights(config))
    return {name: whole(parameter) for name, parameter in model.named_parameters()}
