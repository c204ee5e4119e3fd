"""LoRA trained here against PEFT over transformers' Llama, trained by a plain loop: losses and the adapter's weights.

Same base, same factors at the start, same batches, AdamW, fp32; in one process and cut by shards and columns.
"""

import math
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from configs.check import resolve
from configs.schema import Config
from engine.data.batches import IGNORE
from engine.weights import starting_weights
from models.hf_config import hf_config
from models.hf_weights import our_name
from tests.training import Trained, assert_same_tensors, global_batch, layout_config, lively, train_on

STEPS, WARMUP = 5, 3

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True, "targets": ["q_proj", "down_proj"]}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "biases": ({"bias": "lora_only", "targets": ["k_proj", "o_proj"]}, {"bias": "lora_only"}),
    "lora+": ({"lora_plus_ratio": 8.0}, {}),
}
"""What each of the two calls it."""


def a_config(ours: dict[str, Any], **parallel: Any) -> Config:
    return layout_config(
        STEPS,
        model={"num_layers": 2, "attention_bias": True},
        adapter={"kind": "lora", "rank": 4, "alpha": 6.0} | ours,
        precision={"compute": "fp32", "master": "fp32"},
        data={"micro_batch_size": 3},
        lr={"warmup_steps": WARMUP},
        parallel=parallel,
    )


def name_here(name: str) -> str:
    """Our name of PEFT's parameter while it trains."""
    bare = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default", "")
    return our_name(bare.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"))


def peft_loop(config: Config, theirs: dict[str, Any]) -> Trained:
    """The same training as a person would write it, with nothing of ours but the initial weights."""
    config = resolve(config, 1)
    targets = list(config.adapter.targets)
    given: dict[str, Any] = {"target_modules": "all-linear" if targets == ["all-linear"] else targets} | theirs
    base: Any = LlamaForCausalLM(LlamaConfig(**hf_config(config.model, "float32", None, None)))
    weights = starting_weights(config)
    _fill(base, our_name, lively(weights, config))
    # With the base's weights, as DoRA starts from their lengths.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **given))
    lengths = {name: p.detach().clone() for name, p in model.named_parameters() if "magnitude" in name}
    _fill(model, name_here, lively(weights, config))
    for name, length in lengths.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), length, rtol=1e-5, atol=1e-7)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = _adamw(trained, config)
    found = Trained()
    for step in range(STEPS):
        batch = global_batch(step, documents=False, vocab_size=config.model.vocab_size)
        logits = model(batch.tokens).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.max_grad_norm)
        progress = (step + 1 - WARMUP) / (STEPS - WARMUP)
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * ((step + 1) / WARMUP if step < WARMUP else cosine)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(loss.item())
    found.weights = {name_here(name): p.detach() for name, p in trained.items()}
    return found


def _fill(model: Any, name_of: Any, fill: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            fill(parameter, name_of(name), shape, (0,) * len(shape))


def _adamw(trained: dict[str, torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    optim, groups = config.optim, []
    for name, parameter in trained.items():
        peak = optim.lr * (config.adapter.lora_plus_ratio if "lora_B" in name else 1.0)
        decay = optim.weight_decay if parameter.dim() > 1 else 0.0
        groups.append({"params": [parameter], "weight_decay": decay, "peak": peak})
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form in ("lora", "dora") else [pytest.mark.long]) for form in FORMS]
)
def test_five_steps_equal_a_plain_loop_around_peft(form: str) -> None:
    ours, theirs = FORMS[form]
    expected = peft_loop(a_config(ours), theirs)
    layouts: list[tuple[int, dict[str, Any]]] = [(1, {})]
    if form in ("lora", "dora", "rslora"):
        layouts.append((4, {"dp_shard": 2, "tp": 2}))
    for n, parallel in layouts:
        found = train_on(n, a_config(ours, **parallel))
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        weights = {name: found.weights[name] for name in found.grads}
        assert_same_tensors(f"{n} ranks", weights, expected.weights, 1e-4)
    assert max(expected.losses) - min(expected.losses) > 1e-4, "nothing would be learned, and nothing compared"
