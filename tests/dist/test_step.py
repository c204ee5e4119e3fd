"""The train step on every data-parallel layout equals a plain loop around Hugging Face's Llama, and one process."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from configs.load import config_from_dict
from configs.check import resolve
from configs.schema import Config
from engine.data.batches import IGNORE, Batch
from engine.loss import ChunkLoss, chunk_cross_entropy, next_token
from engine.lr import lr_at
from engine.optim import build_optimizer
from engine.step import direct, train_step
from engine.weights import starting_weights
from models.hf_config import hf_config
from models.hf_weights import our_name
from models.init import fill_local
from parallel.apply import build_model
from parallel.mesh import build_layout
from tests.ranks import run_ranks

VOCAB, SEQ, BATCH = 67, 24, 12  # no power of two: shards are uneven on 2, 3 and 4 ranks


def a_config(steps: int, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"steps": steps},
        "model": {"vocab_size": VOCAB, "dim": 20, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
                  "ffn_dim": 28, "max_seq_len": SEQ},
        "data": {"seq_len": SEQ, "global_batch_size": BATCH, "stores": [{"path": "unused"}]},
        "objective": {"chunk_tokens": 10},
        "optim": {"lr": 3e-3, "max_grad_norm": 0.3},
        "lr": {"warmup_steps": min(3, steps - 1)},
        "precision": {"compute": "fp32"},
    }  # fmt: skip
    for section, values in sections.items():
        tree.setdefault(section, {}).update(values)
    return config_from_dict(tree, "test")


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a step; sequences have unequal numbers of targets, some none at all."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH, SEQ + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(BATCH):
        targets[row, (row * 5 + step) % SEQ :] = IGNORE
    return tokens[:, :-1].contiguous(), targets


def train_here(
    config: Config, all_ignored_at: int, same_batch: bool, chunk_loss: ChunkLoss = chunk_cross_entropy
) -> dict[str, Any]:
    """Train on the ranks there are; return each step's loss and norm, the first step's gradients, and the weights."""
    config = resolve(config, dist.get_world_size())
    layout = build_layout(config.parallel, torch.device("cpu"))
    model = build_model(config, layout, starting_weights(config))
    optimizer = build_optimizer(model, config.optim)
    _, forward_backward = direct(model, next_token(config.objective, chunk_loss), config.parallel.accumulate)
    found: dict[str, Any] = {"losses": [], "norms": [], "skipped": []}

    def spy(microbatches: Any, num_tokens: Any) -> torch.Tensor:
        loss_sum = forward_backward(microbatches, num_tokens)
        if "grads" not in found:
            found["grads"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        return loss_sum

    for step in range(config.run.steps):
        tokens, targets = global_batch(0 if same_batch else step)
        if step == all_ignored_at:
            targets = torch.full_like(targets, IGNORE)
        mine = slice(layout.dp_rank * BATCH // layout.dp_size, (layout.dp_rank + 1) * BATCH // layout.dp_size)
        size = config.data.micro_batch_size
        batches = [
            Batch(tokens=t, targets=w, positions=None, documents=None, num_bytes=0)
            for t, w in zip(tokens[mine].split(size), targets[mine].split(size), strict=True)
        ]
        lr = lr_at(step, config.lr, config.optim.lr, config.run.steps)
        result = train_step(model, optimizer, spy, batches, lr, config.optim.max_grad_norm, layout)
        loss = layout.sum_over_losses(result.loss_sum.double()) / result.num_tokens
        found["losses"].append(loss.item())
        found["norms"].append(result.grad_norm.item())
        found["skipped"].append(result.skipped.item())
    found["weights"] = {name: whole(p) for name, p in model.named_parameters()}
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def on_ranks(n: int, config: Config, all_ignored_at: int = -1, same_batch: bool = False) -> dict[str, Any]:
    return run_ranks(n, train_here, config, all_ignored_at, same_batch)[0]


def huggingface_loop(config: Config) -> dict[str, Any]:
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
    found: dict[str, Any] = {"losses": []}
    for step in range(config.run.steps):
        tokens, targets = global_batch(step)
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        progress = (step + 1 - 3) / (config.run.steps - 3)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * ((step + 1) / 3 if step < 3 else cosine)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
    found["weights"] = {our_name(name): p.detach() for name, p in model.named_parameters()}
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any], part: str, bound: float) -> None:
    assert found[part].keys() == expected[part].keys()
    for name, truth in expected[part].items():
        error = ((found[part][name] - truth).norm() / truth.norm()).item()
        assert error < bound, f"{part} {name}: relative error {error:.2e}"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_twenty_steps_equal_a_plain_loop_around_transformers(n: int, tied: bool) -> None:
    config = a_config(20, model={"tie_embeddings": tied})
    found, expected = on_ranks(n, config), huggingface_loop(config)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert_same(found, expected, "weights", 1e-4)


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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process_in_fp64(layout: str, tied: bool) -> None:
    n, parallel, micro_batch_size = LAYOUTS[layout]
    config = a_config(
        3, precision={"compute": "fp64", "master": "fp64"}, model={"tie_embeddings": tied, "attention_bias": True}
    )
    expected = on_ranks(1, config)
    found = on_ranks(
        n,
        replace(
            config,
            parallel=replace(config.parallel, **parallel),
            data=replace(config.data, micro_batch_size=micro_batch_size),
        ),
    )
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-10)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-10)
    zero = [name for name, grad in expected["grads"].items() if grad.norm() < 1e-14]
    assert all(name.endswith("k_proj.bias") for name in zero)  # softmax doesn't see a shift of all scores
    for name in zero:
        del expected["grads"][name], found["grads"][name]
        del expected["weights"][name], found["weights"][name]
    assert_same(found, expected, "grads", 1e-10)
    assert_same(found, expected, "weights", 1e-10)


@pytest.mark.parametrize("n", [1, 2])
def test_bf16_compute_stays_near_fp32(n: int) -> None:
    low, high = (on_ranks(n, a_config(10, precision={"compute": compute})) for compute in ("bf16", "fp32"))
    assert low["losses"] == pytest.approx(high["losses"], rel=5e-3)
    assert low["losses"] != high["losses"]
    assert {weight.dtype for weight in low["weights"].values()} == {torch.float32}


def test_the_loss_falls() -> None:
    """Equality alone would hold for two trainings that both learn nothing."""
    found = on_ranks(2, a_config(20, optim={"lr": 3e-2}), same_batch=True)
    assert found["losses"][0] == pytest.approx(math.log(VOCAB), rel=0.02)
    assert found["losses"][-1] < 0.8 * found["losses"][0]


def test_a_step_without_targets_changes_nothing() -> None:
    config = a_config(3, lr={"schedule": "constant", "warmup_steps": 0})
    found = on_ranks(2, config, all_ignored_at=2)
    shorter = on_ranks(2, replace(config, run=replace(config.run, steps=2)))
    assert found["skipped"] == [0.0, 0.0, 1.0]
    assert found["norms"][2] == 0.0
    for name, weight in shorter["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


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
