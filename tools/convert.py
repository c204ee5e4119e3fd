"""Exchange models and adapters with Hugging Face: start a run from a folder, or make a folder from a run.

    python tools/convert.py import HF_FOLDER --out CONFIG.toml [--adapter PEFT_FOLDER] [--store STORE]
    python tools/convert.py export RUN_OR_CHECKPOINT OUT [--step N | --best] [--dtype bf16|fp32]
    python tools/convert.py merge ADAPTER_RUN_OR_PEFT_FOLDER OUT [--base HF_FOLDER] [--dtype bf16|fp32]

import copies no weights: it proves the folder, compares its headers with the model and writes a config whose
model.init_from names it; every rank then reads its own slices. export streams tensor by tensor and writes what
transformers' AutoModelForCausalLM and AutoTokenizer load; of a run of an adapter it writes what PEFT loads over the
base, and of several adapters a folder for each. merge adds an adapter to its base in fp32, casts once, and writes the
whole model; the base and the adapter stay as they are, so nothing is ever unmerged.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configs.adapters import AdapterConfig
from configs.check import resolve
from configs.errors import INTERRUPTED, CheckpointError, ConfigError, RunError, problem
from configs.load import to_toml
from configs.schema import Config, DataConfig, LrConfig, OptimConfig, RunConfig, StoreConfig
from configs.targets import EMBEDDING, HEAD, adapted_modules
from engine.hf_tokenizer import special_ids, tokenizer_files
from engine.saved_model import SavedAdapter, SavedModel, open_adapter, open_model
from models.flops import num_params
from models.hf_write import MAX_SHARD_BYTES, write_hf
from models.merge import MERGED_KINDS
from models.peft_format import AdapterWeights, write_peft

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WHOLE_KINDS = ("bitfit", "freeze")  # train parameters of the model itself, so the model is what they made
SEQ_LEN_TOKENS = 2048  # of an imported config: a first run should fit; the user raises it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.do(args)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None, "the module docstring is the help text"
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/convert.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="import | export | merge")
    reading = commands.add_parser("import", help="write a config that starts from a Hugging Face folder")
    reading.add_argument("folder", type=Path, metavar="HF_FOLDER", help="config.json and *.safetensors")
    reading.add_argument("--out", type=Path, required=True, metavar="CONFIG.toml", help="config to write")
    reading.add_argument("--adapter", type=Path, metavar="PEFT_FOLDER", help="adapter over it to train further")
    reading.add_argument("--store", default="", help="token store to train on (default: data/NAME of the config)")
    reading.set_defaults(do=_import)
    writing = commands.add_parser("export", help="write a folder of Hugging Face's, or of PEFT's, from a run")
    writing.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="runs/NAME or one of its checkpoints")
    writing.add_argument("--no-adapter", action="store_true", help="write the base of a run of an adapter instead")
    writing.set_defaults(do=_export)
    merging = commands.add_parser("merge", help="write a Hugging Face folder with the adapter in the weights")
    merging.add_argument(
        "source", type=Path, metavar="SOURCE", help="run of an adapter, its checkpoint, a PEFT or Hugging Face folder"
    )
    merging.add_argument("--adapter", type=Path, metavar="PEFT_FOLDER", help="adapter over a Hugging Face folder")
    merging.set_defaults(do=_merge)
    for command in (writing, merging):
        _add_output(command)
    return parser


def _add_output(command: argparse.ArgumentParser) -> None:
    """What export and merge have in common."""
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--step", type=int, help="checkpoint of this step (default: the newest good one)")
    chosen.add_argument("--best", action="store_true", help="checkpoint with the lowest held-out loss")
    command.add_argument("--base", type=Path, metavar="HF_FOLDER", help="the adapter's base, where it has moved to")
    command.add_argument("--member", default="", help="one of several adapters that were trained at once")
    command.add_argument(
        "--dtype", choices=sorted(DTYPES), help="stored format (default: the run's compute format; an adapter's own)"
    )
    command.add_argument(
        "--max-shard-gb", type=float, default=MAX_SHARD_BYTES / 1e9, help="largest file (default: %(default)g)"
    )
    command.add_argument(
        "--tokenizer", default="", help="tokenizer.json or .model, or none (default: the one saved with the model)"
    )


def _import(args: argparse.Namespace) -> None:
    """Prove the folder and write a config that starts from it."""
    _refuse_existing(args.out)
    if args.folder.is_dir() and not (args.folder / "config.json").is_file():
        why = "a Hugging Face folder describes its model there"
        do = "Copy the model's config.json beside the weights."
        raise CheckpointError(problem(str(args.folder / "config.json"), "", "no such file", why, do))
    saved = open_model(args.folder)
    adapter = AdapterConfig() if args.adapter is None else _import_adapter(args.adapter, saved)
    name = args.out.stem
    store = args.store or f"data/{name}"
    config = Config(
        run=RunConfig(name=name, steps=1000),
        model=replace(saved.config, init_from=str(args.folder.resolve())),
        data=DataConfig(
            stores=(StoreConfig(path=store),),
            seq_len=min(SEQ_LEN_TOKENS, saved.config.max_seq_len),
            global_batch_size=8,
        ),
        adapter=adapter,
        optim=OptimConfig(lr=2e-5 if adapter.kind == "none" else 2e-4),
        lr=LrConfig(warmup_steps=50),
    )
    resolve(config, world_size=1)
    head = f"# torchrun --nproc-per-node 2 launchers/train.py {args.out}\n"
    head += (
        f"# Trains {args.folder.resolve().name} further; run, data, optim and lr are a start, change them at will.\n"
    )
    head += "# For LoRA: --adapter.kind lora --optim.lr 2e-4\n\n" if args.adapter is None else "\n"
    _write_text(args.out, head + to_toml(config))
    print(f"{args.folder}: {num_params(config.model):,} parameters, every tensor in place")
    if args.adapter is not None:
        print(f"{args.adapter}: {adapter.kind}, every tensor in place")
    print(f"wrote {args.out}")
    if not Path(store).exists():
        tokenizer = saved.tokenizer or "TOKENIZER"
        python = shlex.quote(os.path.relpath(sys.executable))
        print(f"next: {python} tools/prepare.py YOUR_TEXT --tokenizer {tokenizer} --out {store}")


def _import_adapter(folder: Path, saved: SavedModel) -> AdapterConfig:
    weights = AdapterWeights(folder, saved.config)
    weights.check(base=saved.reader)
    for name in sorted(adapted_modules(saved.config, weights.config).keys() & {EMBEDDING, HEAD}):
        if not saved.config.tie_embeddings and not weights.config.dora:
            continue
        expected = "PEFT's adapter has LoRA there, and can't be trained further here"
        why = "the loss multiplies with the head in chunks, and would need its rows' lengths in each under DoRA"
        if saved.config.tie_embeddings:
            why = "the base's embedding and head share one weight, and merging an adapter of one would change the other"
        do = "`merge` takes it; train the merged model."
        raise CheckpointError(problem(f"{folder}: target_modules", name, expected, why, do))
    return replace(weights.config, init_from=str(folder.resolve()))


def _export(args: argparse.Namespace) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, or what was trained beside it as PEFT's."""
    adapter = None if args.no_adapter else open_adapter(args.source, step=args.step, best=args.best)
    if adapter is None or adapter.config.kind in WHOLE_KINDS:
        chosen = {"step": args.step, "best": args.best, "base": args.base, "member": args.member}
        _write_model(args, open_model(args.source, **chosen, use_adapter=not args.no_adapter))
        return
    if adapter.config.kind == "bottleneck":
        why, do = "PEFT has no format for it", "tools/generate.py uses the run itself."
        raise CheckpointError(problem("adapter.kind", adapter.config.kind, "can't be exported", why, do))
    given = {"--base": args.base, "--tokenizer": args.tokenizer}
    odd = [problem(name, str(value), "has no effect: the adapter alone is written") for name, value in given.items()
           if value]  # fmt: skip
    if odd:
        raise ConfigError(odd)
    _say_notes(adapter.notes)
    members = [member.name for member in adapter.config.members]
    if args.member or not members:
        _write_adapter(args.out, adapter.of(args.member), args.dtype)
        return
    _refuse_existing(args.out)
    for member in members:
        _write_adapter(args.out / member, adapter.of(member), args.dtype)


def _write_adapter(out: Path, adapter: SavedAdapter, dtype: str | None) -> None:
    stored = DTYPES[dtype] if dtype else None
    base_name = adapter.base or None
    write_peft(out, adapter.model, adapter.config, adapter.tensors(), base_name=base_name, dtype=stored)
    size_mb = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    print(f"{adapter.where} -> {out}: {adapter.config.kind}, {len(adapter.names)} tensors, {size_mb:.3g} MB")
    print(f"its base: {adapter.base or 'drawn from the seed; export --no-adapter writes it'}")
    if adapter.quantization != "none":
        kept = "; merge adds it to what it was trained on" if adapter.config.kind in MERGED_KINDS else ""
        differ = f"{adapter.quantization} (dequantised), whose logits differ from the plain base's"
        print(f"it was trained over that base in {differ}{kept}")


def _merge(args: argparse.Namespace) -> None:
    """Write base and adapter as one model."""
    saved = open_model(
        args.source, step=args.step, best=args.best, base=args.base, adapter=args.adapter, member=args.member
    )
    if saved.adapter is None:
        do = "Give a run of an adapter, a folder of PEFT's, or --adapter PEFT_FOLDER."
        raise ConfigError(problem(str(args.source), "", "has no adapter to merge", do=do))
    _write_model(args, saved)


def _write_model(args: argparse.Namespace, saved: SavedModel) -> None:
    if not args.max_shard_gb > 0:
        raise ConfigError(problem("--max-shard-gb", args.max_shard_gb, "must be more than 0"))
    _say_notes(saved.notes)
    tokenizer = _tokenizer(args.tokenizer, saved)
    bos_id, eos_id = special_ids(tokenizer) if tokenizer else (None, None)
    dtype = DTYPES[args.dtype] if args.dtype else saved.dtype
    config = saved.merged_config
    write_hf(
        args.out,
        config,
        _with_progress(saved),
        dtype=dtype,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        bos_id=bos_id,
        eos_id=eos_id,
        extra_files=tokenizer_files(tokenizer) if tokenizer else {},
    )
    size_gb = sum(path.stat().st_size for path in args.out.iterdir()) / 1e9
    print(f"{saved.where} -> {args.out}: {num_params(config):,} parameters, {dtype}, {size_gb:.3g} GB")
    if tokenizer is None:
        print("without a tokenizer")


def _say_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        do = "Remove it or give another name."
        raise ConfigError(problem(str(out), "", "exists already", "nothing is ever overwritten", do))


def _tokenizer(given: str, saved: SavedModel) -> Path | None:
    """The tokenizer file to export, None for none."""
    if given == "none":
        return None
    path = Path(given) if given else saved.tokenizer
    if path is None:
        do = "Give --tokenizer FILE, or --tokenizer none."
        raise CheckpointError(problem(saved.where, "", "no tokenizer was saved with the model", do=do))
    if not path.is_file():
        raise ConfigError(problem("--tokenizer", given, "no such file", do="Give a tokenizer.json or a .model file."))
    return path


def _with_progress(saved: SavedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the tensors on; on a terminal, say how far it is."""
    done, total = 0, num_params(saved.merged_config)
    for name, tensor in saved.tensors():
        done += tensor.numel()
        if sys.stderr.isatty():
            print(f"\r\x1b[K{100 * done // total:3d}% {name}", end="", file=sys.stderr, flush=True)
        yield name, tensor
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(problem(str(path), "", f"can't be written: {error}")) from None


if __name__ == "__main__":
    sys.exit(main())
