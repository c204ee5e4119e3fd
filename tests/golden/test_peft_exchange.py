"""Adapters against PEFT over transformers' LlamaForCausalLM on the same base, in fp32, both ways and merged.

Every parameter of an adapter is random, B and the magnitudes too, so that nothing hides behind a zero or a one.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from configs.adapters import AdapterConfig, MemberConfig, OverrideConfig
from configs.schema import ModelConfig
from models.adapters import attach
from models.hf_config import hf_config
from models.hf_weights import HfWeights, our_name
from models.hf_write import write_hf
from models.linear import Marks
from models.llama import Llama
from models.merge import merged_config, merged_tensors
from models.peft_config import adapter_of
from models.peft_format import AdapterWeights, split_member, write_peft

TOLERANCE = 1e-5
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mha_biased": {"num_kv_heads": 4, "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"num_kv_heads": 2, "head_dim": 24},
    "tied": {"num_kv_heads": 1, "tie_embeddings": True},
}


@dataclass(frozen=True)
class Case:
    """An adapter as each of the two describes it."""

    ours: AdapterConfig
    theirs: dict[str, Any]
    shape: str = "gqa"


def lora(shape: str = "gqa", theirs: dict[str, Any] | None = None, **ours: Any) -> Case:
    fields: dict[str, Any] = {"targets": ("q_proj", "v_proj"), "rank": 4, "alpha": 12.0} | ours
    given = {"r": 4, "lora_alpha": 12, "target_modules": list(fields["targets"])} | (theirs or {})
    return Case(AdapterConfig(kind="lora", **fields), given, shape)


CASES = {
    "lora": lora(),
    "all_linear": lora("wide_heads", {"target_modules": "all-linear"}, targets=("all-linear",)),
    "some_layers": lora(
        theirs={"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"]}, targets=("layers.1.mlp.up_proj", "o_proj")
    ),
    "regex": lora(theirs={"target_modules": r".*layers\.[02]\..*_proj"}, targets=("layers.0.*", "layers.2.*")),
    "rslora": lora(theirs={"use_rslora": True}, rslora=True),
    "dora": lora(
        "mha_biased", {"use_dora": True, "target_modules": "all-linear"}, dora=True, targets=("all-linear",)
    ),
    "dora_head": lora(theirs={"use_dora": True}, dora=True, targets=("lm_head", "down_proj")),
    "patterns": lora(
        theirs={"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"q_proj": 5},
                "target_modules": "all-linear", "use_rslora": True},
        targets=("all-linear",), rslora=True,
        overrides=(OverrideConfig(targets=("layers.1.mlp.up_proj",), rank=3),
                   OverrideConfig(targets=("q_proj",), rank=2, alpha=5.0)),
    ),
    "ends": lora(targets=("embed_tokens", "lm_head", "k_proj")),
    "head_of_tied": lora("tied", targets=("lm_head", "k_proj")),
    "embedding_of_tied": lora("tied", targets=("embed_tokens",)),
    "biases": lora("mha_biased", {"bias": "lora_only"}, bias="lora_only", targets=("q_proj", "down_proj")),
    "prompt": Case(AdapterConfig(kind="prompt", num_virtual_tokens=3), {"num_virtual_tokens": 3}),
    "prefix": Case(AdapterConfig(kind="prefix", num_virtual_tokens=3), {"num_virtual_tokens": 3}),
    "prefix_mha": Case(AdapterConfig(kind="prefix", num_virtual_tokens=5), {"num_virtual_tokens": 5}, "mha_biased"),
    "prefix_wide": Case(AdapterConfig(kind="prefix", num_virtual_tokens=2), {"num_virtual_tokens": 2}, "wide_heads"),
}  # fmt: skip
MERGED = [name for name, case in CASES.items() if case.ours.kind == "lora"]
CLASSES: dict[str, Any] = {
    "lora": peft.LoraConfig,
    "prompt": peft.PromptTuningConfig,
    "prefix": peft.PrefixTuningConfig,
}


def make_config(shape: str) -> ModelConfig:
    fields = {"vocab_size": 67, "dim": 32, "num_layers": 3, "num_heads": 4, "head_dim": 8, "ffn_dim": 48}
    return ModelConfig(**{**fields, "max_seq_len": 64, "init_std": 0.1, **SHAPES[shape]})


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """PEFT warns of each embedding that it stores once more, and of tied ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_base(config: ModelConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {k: v for k, v in hf_config(config, "float32", 1, 2).items() if k not in ("torch_dtype", "rope_scaling")}
    base: Any = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return base


def make_ours(config: ModelConfig, base: Any, adapter: AdapterConfig | None = None) -> Llama:
    """Our model on the base's weights; the adapter's parameters are random."""
    ours = Llama(config)
    ours.load_state_dict({our_name(name): tensor for name, tensor in base.state_dict().items()})
    if adapter is not None:
        attach(ours, adapter)
        torch.manual_seed(1)
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.3)
    return ours.eval()


def make_theirs(case: Case) -> Any:
    """PEFT's model, every trained number of it random."""
    base = make_base(make_config(case.shape))
    theirs: Any = peft.get_peft_model(base, CLASSES[case.ours.kind](task_type="CAUSAL_LM", **case.theirs))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.3)
    return theirs.eval()


def trained(model: Llama) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits_of(ours: Llama, tokens: torch.Tensor, virtual: int = 0) -> torch.Tensor:
    """With `virtual` learned positions before the tokens."""
    if not virtual:
        return ours.lm_head(ours(tokens))
    rows = tokens.shape[0]
    numbers = torch.cat([torch.arange(virtual), torch.full((tokens.shape[1],), -1)]).expand(rows, -1)
    padded = torch.cat([torch.zeros(rows, virtual, dtype=torch.int64), tokens], dim=1)
    return ours.lm_head(ours(padded, marks=Marks(virtual=numbers)))[:, virtual:]


def assert_same(ours: Llama, theirs: Any, adapter: AdapterConfig | None = None) -> None:
    tokens = torch.arange(40).view(2, 20) * 7 % ours.config.vocab_size
    virtual = adapter.num_virtual_tokens if adapter is not None and adapter.kind in ("prompt", "prefix") else 0
    expected = theirs(tokens).logits[:, -tokens.shape[1] :]
    logits = logits_of(ours, tokens, virtual)
    assert (logits - expected).norm() / expected.norm() < TOLERANCE
    if adapter is not None:
        bare = logits_of(make_ours(ours.config, make_base(ours.config)), tokens)
        assert (bare - expected).norm() / expected.norm() > 0.01, "an adapter without effect would prove nothing"


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_pefts_gives_the_same_logits_here(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path / "peft")
    config = make_config(case.shape)
    base = make_base(config)
    base.save_pretrained(tmp_path / "base")
    weights = AdapterWeights(tmp_path / "peft", config)
    weights.check(case.ours, base=HfWeights(tmp_path / "base"))
    ours = make_ours(config, base, weights.config)
    parameters = trained(ours)
    assert set(weights.names()) == parameters.keys()
    for parameter_name, parameter in parameters.items():
        parameter.copy_(weights.read(parameter_name))
    assert_same(ours, theirs, case.ours)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    config = make_config(case.shape)
    ours = make_ours(config, make_base(config), case.ours)
    write_peft(tmp_path / "peft", config, case.ours, trained(ours).items(), base_name=None)
    theirs: Any = peft.PeftModel.from_pretrained(make_base(config), tmp_path / "peft").eval()
    if case.ours.kind == "lora":
        tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        report: Any = peft.set_peft_model_state_dict(theirs, tensors)
        assert not report.unexpected_keys
        assert not [key for key in report.missing_keys if "lora_" in key]
    assert_same(ours, theirs, case.ours)


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_adapter_equals_pefts_merge_and_the_unmerged_one(name: str, tmp_path: Path) -> None:
    """Of a tied head PEFT changes the embedding too; there only the unmerged model is the truth."""
    case = CASES[name]
    config = make_config(case.shape)
    base = make_base(config)
    base.save_pretrained(tmp_path / "base")
    ours = make_ours(config, base, case.ours)
    write_peft(tmp_path / "peft", config, case.ours, trained(ours).items(), base_name=None)
    adapter = AdapterWeights(tmp_path / "peft", config)
    merged = merged_tensors(config, case.ours, HfWeights(tmp_path / "base"), adapter)
    write_hf(tmp_path / "merged", merged_config(config, case.ours), merged, dtype=torch.float32)
    found: Any = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same(ours, found, case.ours)
    if not config.tie_embeddings:
        theirs: Any = peft.PeftModel.from_pretrained(make_base(config), tmp_path / "peft").merge_and_unload()
        for key, tensor in theirs.state_dict().items():
            assert torch.allclose(found.state_dict()[key], tensor, rtol=0, atol=1e-5), key


@pytest.mark.parametrize("name", CASES)
def test_what_peft_writes_of_our_adapter_is_our_file(name: str, tmp_path: Path) -> None:
    """Key by key and bit by bit, but for the base weights that PEFT stores beside an embedding's adapter."""
    case = CASES[name]
    config = make_config(case.shape)
    ours = make_ours(config, make_base(config), case.ours)
    write_peft(tmp_path / "ours", config, case.ours, trained(ours).items(), base_name=None)
    theirs: Any = peft.PeftModel.from_pretrained(make_base(config), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = (tmp_path / "theirs" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "ours" / "adapter_model.safetensors").read_bytes() == expected
    assert AdapterWeights(tmp_path / "theirs", config).config == AdapterWeights(tmp_path / "ours", config).config


def test_each_member_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    members = (MemberConfig(name="one", rank=2), MemberConfig(name="two", alpha=3.0))
    adapter = AdapterConfig(kind="lora", rank=4, alpha=12.0, targets=("q_proj", "lm_head"), members=members)
    config = make_config("gqa")
    base = make_base(config)
    everything = trained(make_ours(config, base, adapter))
    for member in members:
        parts = {split_member(name, ("one", "two")): tensor for name, tensor in everything.items()}
        own = [(name, tensor) for (name, owner), tensor in parts.items() if owner == member.name]
        write_peft(tmp_path / member.name, config, adapter_of(adapter, member), own, base_name=None)
        alone = replace(adapter, members=(), rank=member.rank or 4, alpha=member.alpha or 12.0)
        AdapterWeights(tmp_path / member.name, config).check(alone)
        ours = make_ours(config, base, alone)
        for name, tensor in own:
            ours.get_parameter(name).data.copy_(tensor)
        theirs: Any = peft.PeftModel.from_pretrained(make_base(config), tmp_path / member.name)
        assert_same(ours, theirs.eval(), alone)


def test_the_projection_of_a_prefix_is_read_as_what_it_computes(tmp_path: Path) -> None:
    case = Case(
        AdapterConfig(kind="prefix", num_virtual_tokens=3),
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5},
    )
    theirs = make_theirs(case)
    theirs.save_pretrained(tmp_path / "peft")
    config = make_config(case.shape)
    weights = AdapterWeights(tmp_path / "peft", config)
    ours = make_ours(config, make_base(config), weights.config)
    for name, parameter in trained(ours).items():
        parameter.copy_(weights.read(name))
    assert_same(ours, theirs, case.ours)


def test_base_weights_beside_an_adapter_must_be_the_bases(tmp_path: Path) -> None:
    case = CASES["ends"]
    make_theirs(case).save_pretrained(tmp_path / "peft")
    config = make_config(case.shape)
    make_base(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][5, 5] += 1
    save_file(tensors, file)
    weights = AdapterWeights(tmp_path / "peft", config)
    text = (
        f"{tmp_path / 'peft'}: the adapter does not fit; use the base and the settings that it was trained with:\n"
        "  base_model.model.lm_head.base_layer.weight (67, 32): a weight of the base, and not what the base has"
    )
    with pytest.raises(Exception, match="the adapter does not fit") as caught:
        weights.check(base=HfWeights(tmp_path / "base"))
    assert str(caught.value) == text
    with pytest.raises(Exception, match="a weight of the base, which can't be compared here"):
        weights.check()
