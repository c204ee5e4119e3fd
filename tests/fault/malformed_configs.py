"""Malformed configs and command lines, for the launchers and the tools. Each is refused before torch is imported."""

from collections.abc import Sequence

from hypothesis import strategies as st

from configs.fields import INDEX
from configs.ranges import RANGES
from tests.fault.malformed import Case, drawn, put
from tests.runs import CONFIG

FILE = "wrong.toml"


def config(name: str, content: bytes | str, names: str, *argv: str, code: int = 2) -> Case:
    return Case(name, "train", [FILE, *argv], names, code, put(FILE, content))


def line(name: str, old: str, new: str, names: str) -> Case:
    """The good config with one line changed."""
    assert old in CONFIG, old
    return config(name, CONFIG.replace(old, new, 1), names)


def added(name: str, more: str, names: str) -> Case:
    return config(name, CONFIG + more, names)


def options(name: str, argv: Sequence[str], names: str, tool: str = "train", code: int = 2) -> Case:
    return Case(name, tool, argv, names, code)  # pyright: ignore[reportArgumentType]


TEXTS = [
    config("no bytes at all", "", "run"),
    config("not TOML", "[run\nname = 'x'\n", f"{FILE}:1: not valid TOML"),
    config("YAML", "run:\n  name: tiny\n  lr: 3e-4\n", f"{FILE}:1"),
    config("JSON", '{"run": {"name": "tiny"}}', f"{FILE}:1"),
    config("not UTF-8", CONFIG.encode() + b"# \xff\xfe\n", f"{FILE}: is not UTF-8"),
    config("UTF-16", CONFIG.encode("utf-16"), f"{FILE}: is not UTF-8"),
    config("binary", bytes(range(256)), FILE),
    config("a NUL byte", CONFIG.replace("tiny", "ti\0ny"), FILE),
    config("cut in the middle of a string", CONFIG[: CONFIG.index('"tiny"') + 3], f"{FILE}:"),
    config("brackets without end", "run = " + "[" * 5000, FILE),
    config("tables without end", "run = " + "{a = " * 5000, FILE),
    config("a number of 5,000 digits", CONFIG.replace("lr = 3e-3", "lr = " + "9" * 5000), FILE),
    added("a section twice", "[run]\nsteps = 3\n", "given twice"),
    config("a key twice", CONFIG.replace("steps = 24", "steps = 24\nsteps = 25"), "given twice"),
    added("an unknown section", "[optimizer]\nlr = 1.0\n", "optimizer"),
    added("a section that is a value", "[x]\ny = 1\n", "x"),
    added("a date", "[lr2]\n", "lr2"),
    line("an unknown key", "lr = 3e-3", "learning_rate = 3e-3", "learning_rate"),
    line("a key with another key's letter", "num_layers = 2", "num_layer = 2", "num_layer"),
    line("a string where a number is due", "steps = 24", 'steps = "24"', "run.steps = '24'"),
    line("a fraction where a whole number is due", "steps = 24", "steps = 24.5", "run.steps = 24.5"),
    line("true where a number is due", "steps = 24", "steps = true", "run.steps = true"),
    line("a date where a number is due", "steps = 24", "steps = 2026-01-01", "run.steps"),
    line("a list where a number is due", "steps = 24", "steps = [24]", "run.steps = [24]"),
    line("a table where a number is due", "steps = 24", "steps = {value = 24}", "run.steps"),
    line("a number where text is due", 'name = "tiny"', "name = 7", "run.name = 7"),
    line("a number where a choice is due", "tensorboard = false", "tensorboard = 0", "metrics.tensorboard = 0"),
    line("no such name of a choice", "seq_len = 16", 'seq_len = 16\npacking = "best"', "data.packing = 'best'"),
    line("a table where a list is due", "[[data.stores]]", "[data.stores]", "data.stores"),
    line("a name that is a path", 'name = "tiny"', 'name = "../tiny"', "run.name = '../tiny'"),
    line("a name of nothing", 'name = "tiny"', 'name = ""', "run.name"),
    line("a name with a line end", 'name = "tiny"', 'name = "ti\\nny"', "run.name"),
    line("not a number", "lr = 3e-3", "lr = nan", "optim.lr = nan"),
    line("infinity", "lr = 3e-3", "lr = inf", "optim.lr = inf"),
    line("a number of 80 bits", "steps = 24", "steps = 1208925819614629174706176", "run.steps"),
    line("a store without a path", 'path = "store"', "weight = 2.0", "data.stores.0.path"),
    line("a store that isn't there", 'path = "store"', 'path = "stoer"', "stoer"),
    line("a store with a path of nothing", 'path = "store"', 'path = ""', "data.stores.0"),
    line("a store twice", 'path = "store"', 'path = "store"\n[[data.stores]]\npath = "store"', "data.stores.1"),
    line(
        "sources that aren't there", 'path = "store"', 'path = "new"\nsources = ["no"]\ntrain_tokenizer = 300', "'no'"
    ),
    line("sources without a tokenizer", 'path = "store"', 'path = "new"\nsources = ["texts"]', "data.stores.0"),
    line("heads that don't divide the width", "num_heads = 4", "num_heads = 5", "model.num_heads = 5"),
    line("heads that don't divide the heads", "num_kv_heads = 2", "num_kv_heads = 3", "model.num_kv_heads = 3"),
    line("more warmup than steps", "warmup_steps = 2", "warmup_steps = 200", "lr.warmup_steps"),
    line("a decay without its schedule", "warmup_steps = 2", "warmup_steps = 2\ndecay_steps = 3", "lr.decay_steps"),
    line("a schedule without its decay", "warmup_steps = 2", 'schedule = "wsd"', "lr.decay_steps"),
    line("a sequence longer than the model's", "seq_len = 16", "seq_len = 65", "data.seq_len = 65"),
    added("a base that isn't there", "[adapter]\nkind = 'lora'\n[model.x]\n", "model.x"),
    added("a target that matches nothing", "[adapter]\nkind = 'lora'\ntargets = ['qkv']\n", "adapter.targets"),
    added("a setting of another adapter", "[adapter]\nkind = 'prompt'\nrank = 4\n", "adapter.rank"),
    added("an adapter's setting without one", "[adapter]\nrank = 4\n", "adapter.rank"),
    added(
        "members of one name", "[adapter]\nkind = 'lora'\nmembers = [{name = 'a'}, {name = 'a'}]\n", "adapter.members"
    ),
    added("a member that is a path", "[adapter]\nkind = 'lora'\nmembers = [{name = '../a'}, {name = 'b'}]\n", "../a"),
    added("more degrees than ranks", "[parallel]\ntp = 2\n", "parallel.tp = 2"),
    added("a fault of no kind", "[fault.inject]\nkind = 'meteor'\n", "fault.inject.kind = 'meteor'"),
]

COMMANDS = [
    options("nothing", [], "launchers/train.py"),
    options("an option first", ["--run.steps", "3"], "launchers/train.py"),
    options("no such file", ["tinny.toml"], "tinny.toml"),
    options("a folder", ["texts"], "texts"),
    options("an empty word", [""], "."),
    options("an option without a value", ["tiny.toml", "--run.steps"], "--run.steps: needs a value"),
    options("an option before another", ["tiny.toml", "--run.steps", "--run.seed", "1"], "--run.steps: needs a value"),
    options("an option twice", ["tiny.toml", "--run.steps", "3", "--run.steps=4"], "--run.steps: given twice"),
    options("an unknown option", ["tiny.toml", "--optim.weight_deacy", "1"], "--optim.weight_decay"),
    options("an option of an unknown section", ["tiny.toml", "--optimizer.lr", "1"], "--optimizer.lr"),
    options("a section alone", ["tiny.toml", "--run", "3"], "run"),
    options("a word too many", ["tiny.toml", "other.toml"], "other.toml: unexpected argument"),
    options("one dash", ["tiny.toml", "-run.steps", "3"], "-run.steps: unexpected argument"),
    options("two dashes", ["tiny.toml", "--"], "--"),
    options("an empty value", ["tiny.toml", "--run.steps="], "--run.steps"),
    options("an entry far behind the last", ["tiny.toml", "--data.stores.7.path", "x"], "data.stores"),
    options("an entry without a number", ["tiny.toml", "--data.stores.x.path", "x"], "data.stores.x"),
    options("a path below a number", ["tiny.toml", "--run.steps.x", "1"], "run.steps"),
    options("a number too large", ["tiny.toml", "--optim.lr", "1e400"], "--optim.lr"),
    options("a store that is a file", ["tiny.toml", "--data.stores.0.path", "tiny.toml"], "tiny.toml", code=2),
    options("a list that isn't closed", ["tiny.toml", "--data.stores", "[{path = 'x'}"], "data.stores"),
    options("a start from nowhere", ["tiny.toml", "--model.init_from", "nowhere"], "model.init_from = 'nowhere'"),
    options("proof by letters", ["tiny.toml", "--data.verify", "letters"], "--data.verify = 'letters'"),
    options("half a character", ["tiny.toml", "--run.name", "a\udce4b"], "--run.name"),
    options("slurm: nothing", [], "CONFIG", "slurm"),
    options("slurm: no nodes", ["tiny.toml"], "--nodes", "slurm"),
    options(
        "slurm: 0 nodes", ["tiny.toml", "--nodes", "0", "--gpus-per-node", "1", "--dry-run"], "--nodes = 0", "slurm"
    ),
    options(
        "slurm: -1 ranks", ["tiny.toml", "--nodes=1", "--gpus-per-node=-1", "--dry-run"], "--gpus-per-node", "slurm"
    ),
    options("slurm: many nodes", ["tiny.toml", "--nodes=many", "--gpus-per-node=1"], "--nodes", "slurm"),
    options("slurm: no such file", ["no.toml", "--nodes=1", "--gpus-per-node=1", "--dry-run"], "no.toml", "slurm"),
    options(
        "slurm: a wrong override",
        ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--dry-run", "--run.steps", "x"],
        "--run.steps = 'x'",
        "slurm",
    ),
    options(
        "slurm: a time of words", ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--time", "soon"], "soon", "slurm"
    ),
    options(
        "slurm: no time", ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--time", "1", "--dry-run"], "--time", "slurm"
    ),
    options(
        "slurm: an unknown option", ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--gpus", "3"], "--gpus", "slurm"
    ),
    options(
        "slurm: half an sbatch option",
        ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--sbatch", "x", "--dry-run"],
        "--sbatch",
        "slurm",
    ),
    options(
        "slurm: ranks that don't divide the batch",
        ["tiny.toml", "--nodes=3", "--gpus-per-node=1", "--dry-run"],
        "data.global_batch_size = 8",
        "slurm",
    ),
    options(
        "slurm: both at once",
        ["tiny.toml", "--nodes=1", "--gpus-per-node=1", "--dry-run", "--local"],
        "--local",
        "slurm",
    ),
    options("prepare: nothing", [], "INPUT", "prepare"),
    options("prepare: no tokenizer", ["texts", "--out", "new"], "--tokenizer", "prepare"),
    options(
        "prepare: two tokenizers",
        ["texts", "--out", "new", "--tokenizer", "x", "--train-tokenizer", "300"],
        "--tokenizer",
        "prepare",
    ),
    options(
        "prepare: a vocabulary of words", ["texts", "--out", "new", "--train-tokenizer", "large"], "large", "prepare"
    ),
    options(
        "prepare: no such type",
        ["texts", "--out", "new", "--train-tokenizer", "300", "--dtype", "int8"],
        "int8",
        "prepare",
    ),
    options("convert: nothing", [], "import | export | merge", "convert"),
    options("convert: no such command", ["exprot", "runs/saved", "out"], "exprot", "convert"),
    options("convert: export to nowhere", ["export", "runs/saved"], "OUT", "convert"),
    options("convert: a step of words", ["export", "runs/saved", "out", "--step", "last"], "last", "convert"),
    options(
        "convert: shards of nothing",
        ["export", "runs/saved", "out", "--max-shard-gb", "0"],
        "--max-shard-gb",
        "convert",
    ),
    options(
        "convert: shards of less", ["export", "runs/saved", "out", "--max-shard-gb", "nan"], "--max-shard-gb", "convert"
    ),
    options("convert: over what is there", ["import", "base", "--out", "tiny.toml"], "tiny.toml", "convert"),
    options("generate: nothing", [], "FOLDER", "generate"),
    options("generate: -1 threads", ["base", "--threads", "-1"], "--threads = -1", "generate"),
    options("generate: no tokens", ["base", "--max-new-tokens", "0"], "max_new_tokens", "generate"),
    options("generate: ice", ["base", "--temperature", "-1"], "temperature", "generate"),
    options("generate: no heat at all", ["base", "--temperature", "nan"], "temperature", "generate"),
    options("generate: more than all", ["base", "--top-p", "1.5"], "top_p", "generate"),
    options("generate: no such device", ["base", "--device", "abacus"], "--device = 'abacus'", "generate"),
    options("generate: an adapter that isn't there", ["base", "--merged"], "--merged", "generate"),
    options("generate: a prompt of half a character", ["base", "--prompt", "\udce4"], "--prompt", "generate"),
    options("evaluate: no store", ["base"], "--store", "evaluate"),
    options("evaluate: less than nothing", ["base", "--store", "store", "--seq-len", "-1"], "--seq-len", "evaluate"),
    options(
        "evaluate: longer than the model", ["base", "--store", "store", "--seq-len", "65"], "--seq-len", "evaluate"
    ),
]


def _outside(key: str) -> st.SearchStrategy[tuple[str, str]]:
    """A number that a field may not hold, as text."""
    allowed = RANGES[key]
    bad = []
    if allowed.least is not None:
        bad.append(st.integers(-(10**6), int(allowed.least) - 1).map(str))
    if allowed.above is not None:
        bad += [st.integers(-(10**6), int(allowed.above)).map(str)]
    if allowed.most is not None:
        bad.append(st.integers(int(allowed.most) + 1, 10**6).map(str))
    if allowed.below is not None and allowed.below < 2:
        bad.append(st.integers(int(allowed.below), 10**6).map(str))
    return st.tuples(st.just(key.replace(INDEX, "0")), st.one_of(bad))


WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)
SECTIONS = ("run", "model", "data", "optim", "lr", "parallel", "checkpoint", "metrics", "eval", "fault")
OUTSIDE = drawn(st.sampled_from(sorted(key for key in RANGES if INDEX not in key)).flatmap(_outside), 30)
UNKNOWN = drawn(st.tuples(st.sampled_from(SECTIONS), WORDS.map(lambda word: f"q{word}")), 10)
NOISE = drawn(st.binary(min_size=20, max_size=200).filter(lambda data: b"\xff" in data), 6)

DRAWN = [options(f"drawn: {key} {value}", ["tiny.toml", f"--{key}={value}"], key) for key, value in OUTSIDE]
DRAWN += [added(f"drawn: key {section}.{word}", f"\n[{section}x]\n{word} = 1\n", f"{section}x")
          for section, word in UNKNOWN]  # fmt: skip
DRAWN += [config(f"drawn: {data[:8].hex()}", data, FILE) for data in NOISE]

CONFIGS = TEXTS + COMMANDS + DRAWN
