"""The strict loader: every refusal by its exact text, overrides, presets by name, the ways back to TOML and dicts."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import config_from_dict, config_hash, config_to_dict, load_config, to_toml
from configs.schema import Config, RopeScalingConfig
from tests.unit.configs.conftest import SOUND


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert caught.value.exit_code == 2
    return caught.value.problems


def with_text(file: Path, text: str) -> list[str]:
    """Give the problems of the sound file with some text changed or added at its end."""
    file.write_text(SOUND + text)
    return problems(file)


def test_a_sound_file_loads_with_its_values_and_the_defaults(file: Path) -> None:
    config = load_config(file, [])
    assert config.run.steps == 20
    assert config.data.stores[0].path == "data/x"
    assert config.optim.beta2 == 0.95
    assert config.model.rope_scaling is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[parallel]\ndp_shards = 3", "x.toml: parallel.dp_shards: unknown key; did you mean parallel.dp_shard?"),
        ("[lr]\nbeta1 = 0.9", "x.toml: lr.beta1: unknown key; did you mean optim.beta1?"),
        (
            "[optim]\nevery_steps = 3",
            "x.toml: optim.every_steps: unknown key; did you mean checkpoint.every_steps, metrics.every_steps or "
            "eval.every_steps?",
        ),
        ("[compile]\nrank = 8", "x.toml: compile.rank: unknown key; did you mean adapter.rank?"),
        ("[optimizer]\nlr = 1", "x.toml: optimizer: unknown key; did you mean optim?"),
        (
            "[compile]\nzzz = 1",
            "x.toml: compile.zzz: unknown key. The keys of compile are blocks and loss.",
        ),
        (
            "[zzz]\nlr = 1",
            "x.toml: zzz: unknown key. The sections are run, model, data, adapter, objective, optim, lr, parallel, "
            "recompute, precision, compile, checkpoint, metrics, eval and fault.",
        ),
        ("weigth = 2.0", "x.toml: data.stores.0.weigth: unknown key; did you mean data.stores.0.weight?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(file: Path, text: str, expected: str) -> None:
    assert with_text(file, text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[lr]\nwarmup_steps = '2'", "x.toml: lr.warmup_steps = '2': must be an integer. Write 2, without quotes."),
        ("[lr]\nwarmup_steps = true", "x.toml: lr.warmup_steps = true: must be an integer."),
        ("[lr]\nwarmup_steps = 2.0", "x.toml: lr.warmup_steps = 2.0: must be an integer. Write 2."),
        ("[lr]\nwarmup_steps = 2.5", "x.toml: lr.warmup_steps = 2.5: must be an integer."),
        ("[optim]\nlr = '3e-4'", "x.toml: optim.lr = '3e-4': must be a number. Write 0.0003, without quotes."),
        ("[optim]\nlr = true", "x.toml: optim.lr = true: must be a number."),
        ("[optim]\nlr = nan", "x.toml: optim.lr = nan: must be a finite number."),
        ("[optim]\nlr = -inf", "x.toml: optim.lr = -inf: must be a finite number."),
        ("[compile]\nblocks = 1", "x.toml: compile.blocks = 1: must be true or false."),
        ("[compile]\nblocks = 'true'", "x.toml: compile.blocks = 'true': must be true or false."),
        ("tokenizer = 4", 'x.toml: data.stores.0.tokenizer = 4: must be a string. Write "4".'),
        (
            'tokenizer = "a\\u0000b"',
            "x.toml: data.stores.0.tokenizer = 'a\\x00b': must be text without control characters.",
        ),
        ("sources = 'a'", "x.toml: data.stores.0.sources = 'a': must be a list of strings. Write [\"a\"]."),
        ("sources = ['a', 3]", 'x.toml: data.stores.0.sources.1 = 3: must be a string. Write "3".'),
        ("lr = {a = 1}", "x.toml: data.stores.0.lr: unknown key; did you mean optim.lr?"),
        (
            "[lr]\nschedule = 'cosinus'",
            "x.toml: lr.schedule = 'cosinus': must be 'cosine', 'linear', 'constant' or 'wsd'. Did you mean 'cosine'?",
        ),
        ("[precision]\ncompute = 16", "x.toml: precision.compute = 16: must be 'bf16', 'fp32' or 'fp64'."),
        (
            "[model.rope_scaling]\nfactor = 'x'",
            "x.toml: model.rope_scaling.factor = 'x': must be a number.",
        ),
    ],
)
def test_a_wrong_type_is_refused(file: Path, text: str, expected: str) -> None:
    assert with_text(file, text) == [expected]


def test_tables_and_lists_are_not_mixed_up(file: Path) -> None:
    file.write_text('compile = 5\nobjective = [1]\n[data]\nstores = {path = "x"}\nseq_len = 4\nglobal_batch_size = 2')
    assert problems(file) == [
        "x.toml: run.steps: is required: an integer. Set it in the file or with --run.steps.",
        "x.toml: model.vocab_size: is required: an integer. Set it in the file or with --model.vocab_size.",
        "x.toml: model.dim: is required: an integer. Set it in the file or with --model.dim.",
        "x.toml: model.num_layers: is required: an integer. Set it in the file or with --model.num_layers.",
        "x.toml: model.num_heads: is required: an integer. Set it in the file or with --model.num_heads.",
        "x.toml: model.ffn_dim: is required: an integer. Set it in the file or with --model.ffn_dim.",
        "x.toml: data.stores = {'path': 'x'}: must be a list of tables. Write [[data.stores]] above its keys.",
        "x.toml: objective = [1]: must be a table. Its keys: kind and chunk_tokens.",
        "x.toml: compile = 5: must be a table. Its keys: blocks and loss.",
    ]


def test_an_integer_may_stand_where_a_float_is_expected(file: Path) -> None:
    config = load_config(file, ["--optim.lr", "1"])
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)


def test_an_integer_beyond_64_bits_is_refused(file: Path) -> None:
    for number in (hex(2**63), "0x8000000000000000" + "0" * 6000):
        shown = hex(2**63)[:20]
        assert problems(file, "--run.seed", number)[0].startswith(f"--run.seed = {shown}")
        assert problems(file, "--run.seed", number)[0].endswith("...: must fit in 64 bits.")
    assert problems(file, "--optim.lr", "0x8" + "0" * 6000) == [
        "--optim.lr = 0x800000000000000000...: must be a finite number."
    ]
    assert load_config(file, ["--run.seed", str(2**63 - 1)]).run.seed == 2**63 - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run]\nsteps = 1\nsteps = 2\n", "x.toml:3: a key or section is given twice. Keep one."),
        ("[run]\nsteps = 1\nsteps = 2", "x.toml:3: a key or section is given twice. Keep one."),
        ("[run]\nsteps = 1\n[run]\nseed = 2", "x.toml:3: a key or section is given twice. Keep one."),
        ("[run]\nsteps = \n", "x.toml:2: not valid TOML: invalid value. Correct that."),
        ("[run]\nsteps: 4\n", "x.toml:2: not valid TOML: expected '=' after a key in a key/value pair. Correct that."),
    ],
)
def test_broken_toml_is_refused_with_its_line(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    assert problems(file) == [expected]


def test_a_file_that_is_not_utf8_is_refused(file: Path) -> None:
    file.write_bytes(b"[run]\nname = '\xff'\n")
    assert problems(file) == ["x.toml: is not UTF-8 text (byte 14). Save it as UTF-8."]


def test_a_byte_order_mark_and_crlf_are_accepted(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + SOUND.replace("\n", "\r\n").encode())
    assert load_config(file, []).run.steps == 20


def test_a_missing_file_names_the_nearest_preset(file: Path) -> None:
    assert problems(Path("quikstart")) == ["quikstart: no such file or preset. Did you mean configs/quickstart.toml?"]
    assert problems(Path("configs/quickstat.toml")) == [
        "configs/quickstat.toml: no such file or preset. Did you mean configs/quickstart.toml?"
    ]
    assert problems(Path("zzz"))[0].startswith("zzz: no such file or preset. Presets: bench, debug, ")


def test_a_folder_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert problems(Path("runs")) == ["runs: is a folder; a TOML file is expected."]
    (tmp_path / "runs" / "a" / "config.toml").write_text(SOUND)
    assert problems(Path("runs/a")) == ["runs/a: is a folder. Use runs/a/config.toml."]


def test_a_bare_name_is_a_preset_from_any_folder(file: Path) -> None:
    assert load_config(Path("debug"), []).run.name == "debug"
    assert load_config(Path("debug.toml"), []).run.name == "debug"


def test_overrides_are_typed_like_the_file(file: Path) -> None:
    words = """--run.steps 50 --run.name=7 --compile.blocks true --parallel.dp_shard -1 --optim.lr 3e-3
        --data.stores.0.path data/mine --model.rope_scaling.factor 32 --lr.schedule wsd --run.dir=a=b"""
    config = load_config(file, words.split())
    assert config.run.steps == 50
    assert config.run.name == "7"
    assert config.run.dir == "a=b"
    assert config.compile.blocks is True
    assert config.parallel.dp_shard == -1
    assert config.optim.lr == 0.003
    assert config.data.stores[0].path == "data/mine"
    assert config.model.rope_scaling == RopeScalingConfig(factor=32.0)
    assert config.lr.schedule == "wsd"


def test_overrides_add_and_change_entries_of_a_list(file: Path) -> None:
    config = load_config(file, ["--data.stores.0.weight", "3", "--data.stores.1.path", "b"])
    assert [(store.path, store.weight) for store in config.data.stores] == [("data/x", 3.0), ("b", 1.0)]
    file.write_text(SOUND.replace('[[data.stores]]\npath = "data/x"', ""))
    assert load_config(file, ["--data.stores.0.path", "b"]).data.stores[0].path == "b"


def test_an_override_below_a_broken_section_reports_the_section(file: Path) -> None:
    file.write_text("compile = 5\n" + SOUND)
    assert problems(file, "--compile.blocks", "true") == [
        "x.toml: compile = 5: must be a table. Its keys: blocks and loss."
    ]


def test_overrides_take_lists_of_tables_and_none(file: Path) -> None:
    file.write_text(SOUND + "[model.rope_scaling]\nfactor = 8")
    stores = '[{path = "a", weight = 2}, {path = "b", sources = ["c"]}]'
    config = load_config(file, ["--data.stores", stores, "--model.rope_scaling", "none"])
    assert [(store.path, store.weight, store.sources) for store in config.data.stores] == [
        ("a", 2.0, ()),
        ("b", 1.0, ("c",)),
    ]
    assert config.model.rope_scaling is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--parallel.dp_shards 3", "--parallel.dp_shards: unknown option; did you mean --parallel.dp_shard?"),
        ("--parallel.dp-shard 3", "--parallel.dp-shard: unknown option; did you mean --parallel.dp_shard?"),
        ("--optimizer.lr 3", "--optimizer.lr: unknown option; did you mean --optim.lr?"),
        ("--steps 3", "--steps: unknown option; did you mean --run.steps?"),
        ("--run.name.x 3", "--run.name.x: unknown option: run.name is a string."),
        ("--data.stores.2.path b", "--data.stores.2.path: unknown option: the next entry of data.stores would be 1."),
        ("--data.stores.1.weight 2", "x.toml: data.stores.1.path: is required: a string. Set it in the file or with "
         "--data.stores.1.path."),
        ("--run.steps", "--run.steps: needs a value. Write --run.steps VALUE."),
        ("--run.steps 3 --run.steps 4", "--run.steps: given twice. Keep one."),
        ("--run.steps x", "--run.steps = 'x': must be an integer."),
        ("--run.steps=", "--run.steps = '': must be an integer."),
        ("--run.device cud", "--run.device = 'cud': must be 'auto', 'cpu' or 'cuda'. Did you mean 'cuda'?"),
        ("--run.device gpu", "--run.device = 'gpu': must be 'auto', 'cpu' or 'cuda'."),
        ("--compile.blocks yes", "--compile.blocks = 'yes': must be true or false."),
        ("b.toml", "b.toml: unexpected argument. Options are --section.field VALUE."),
        ("--model 3", "--model = 3: must be a table. Its keys: kind, vocab_size, dim, num_layers, num_heads, "
         "num_kv_heads, head_dim, ffn_dim, max_seq_len, rope_theta, rope_scaling, norm_eps, tie_embeddings, "
         "attention_bias, mlp_bias, init_std, init_from and attention."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused(file: Path, words: str, expected: str) -> None:
    assert problems(file, *words.split()) == [expected]


def test_every_problem_is_reported_at_once(file: Path) -> None:
    file.write_text(SOUND + "[optim]\nlr = 'x'\nbeta9 = 1\n")
    assert problems(file, "--run.seed", "0.5", "--optimizer.lr", "1", "--optimizer.eps", "1", "stray") == [
        "stray: unexpected argument. Options are --section.field VALUE.",
        "--optimizer.eps: unknown option; did you mean --optim.eps?",
        "--optimizer.lr: unknown option; did you mean --optim.lr?",
        "--run.seed = 0.5: must be an integer.",
        "x.toml: optim.beta9: unknown key; did you mean optim.beta2?",
        "x.toml: optim.lr = 'x': must be a number.",
    ]


def test_a_value_on_two_lines_is_a_bare_word_and_sets_nothing_else(file: Path) -> None:
    assert load_config(file, ["--lr.schedule", "wsd"]).lr.schedule == "wsd"
    assert problems(file, "--run.seed", "1\nsteps = 2") == ["--run.seed = '1\\nsteps = 2': must be an integer."]


def test_dicts_round_trip_through_json(file: Path) -> None:
    config = load_config(file, ["--model.rope_scaling.factor", "32"])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config))), "saved") == config


def test_a_saved_dict_is_checked_strictly(file: Path) -> None:
    values = config_to_dict(load_config(file, []))
    values["run"]["stepz"] = 3
    values["model"]["rope_scaling"] = "x"
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, "runs/a/config.resolved.json")
    assert caught.value.problems == [
        "runs/a/config.resolved.json: run.stepz: unknown key; did you mean run.steps?",
        "runs/a/config.resolved.json: model.rope_scaling = 'x': must be a table. Its keys: factor, low_freq_factor, "
        "high_freq_factor and original_max_seq_len.",
    ]


def test_toml_holds_deviations_only(file: Path) -> None:
    config = load_config(file, ["--model.rope_scaling", "{}", "--optim.lr", "3e-4", "--optim.eps", "1e-6"])
    assert (
        to_toml(config)
        == SOUND.lstrip()
        .replace("[model]", "\n[model]")
        .replace("[data]", "\n[model.rope_scaling]\n\n[data]")
        .replace("[[data", "\n[[data")
        + "\n[optim]\neps = 1e-06\n"
    )


def test_the_hash_knows_values_but_not_the_order_of_fields(file: Path) -> None:
    config = load_config(file, [])
    values = config_to_dict(config)
    backwards = {name: dict(reversed(table.items())) for name, table in reversed(values.items())}
    assert config_hash(config_from_dict(backwards, "here")) == config_hash(config)
    assert config_hash(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))) != config_hash(config)


def test_a_config_can_not_be_changed(file: Path) -> None:
    config: Config = load_config(file, [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
