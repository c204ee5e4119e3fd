"""Building a run: data, model, optimizer, and the state it continues from; every rank does it, in this order.

All that can be refused is refused before the first step, the cheapest first: stores before weights, weights before
checkpoints.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.check import curve_notice, resume_differences
from configs.errors import ConfigError, problem
from configs.schema import Config
from engine.base_identity import base_identity, check_base
from engine.checkpoint.checkpointer import Checkpointer, Found
from engine.checkpoint.manifest import list_steps
from engine.checkpoint.storage import free_space
from engine.compiler import check_compiled_context, check_compiler
from engine.data.batches import Batch, Batches
from engine.data.members import MemberBatches
from engine.data.prepare import prepare_from_config
from engine.fault.attempts import Start
from engine.fault.care import Care, take_care
from engine.fault.heartbeat import Heart
from engine.fault.record import FaultLog
from engine.fault.stop import StopRequests
from engine.folder import RunFolder
from engine.loss import chunk_cross_entropy, compiled_chunk_loss, next_token
from engine.memory import check_memory, choose_base, saved_bytes
from engine.optim import build_optimizer
from engine.peaks import measured_gemm_tflops
from engine.pipelined import check_schedule, pipelined
from engine.progress import ProgressDisplay
from engine.proof import prove_inputs, prove_tokenizers
from engine.ranks import rank_0_first
from engine.run import Run
from engine.step import Forward, ForwardBackward, direct
from engine.trained import trained_table
from engine.weights import starting_weights
from models.flops import num_params
from parallel.apply import attention_backend, build_model
from parallel.float8 import check_float8
from parallel.fsdp import DTYPES
from parallel.materialise import Fill
from parallel.mesh import Layout, build_layout


def build_run(
    config: Config,
    given: str,
    device: torch.device,
    ranks_on_node: int,
    progress: ProgressDisplay | None,
    start: Start | None = None,
    requests: StopRequests | None = None,
    tell: Callable[[str], None] | None = None,
    heart: Heart | None = None,
) -> Run:
    """Build a run from a resolved config and the text it was `given` as; torch.distributed is initialised.

    `start` is what the launcher knows of this start, `requests` where it notes who asks the run to stop, `tell`
    takes what any rank has to say of faults, and `heart` where the rank says how far it is.
    """
    config = _checked_for_device(config, device, ranks_on_node)
    layout = build_layout(config.parallel, device)
    say = progress.say if progress is not None else _silent
    folder = RunFolder(config.run)
    heart = heart or Heart(config.fault)
    try:
        _claim(folder, config, heart, say)
        data, heldout = _open_batches(config, training=True), _heldout(config, layout)
        _check_vocabulary(config, data)
        title = f"{config.run.name}: {num_params(config.model):,} parameters, {_layout_text(layout)}"
        say(f"{title}, writing to {folder.path}")
        care = take_care(config, layout, folder, start or Start(), requests or StopRequests(), tell or say, heart)
        with care.until_built():
            return _build_parts(config, given, layout, folder, data, heldout, care, progress, say)
    except BaseException:
        folder.give_up()
        raise


def _build_parts(
    config: Config,
    given: str,
    layout: Layout,
    folder: RunFolder,
    data: Batches | MemberBatches,
    heldout: Callable[[], Iterable[Batch]],
    care: Care,
    progress: ProgressDisplay | None,
    say: Callable[[str], None],
) -> Run:
    """Find what there is to go on from, and build what is trained."""
    beat = partial(care.heart.beat, 0, "build")  # each part of the start has its time
    beat()
    checkpointer = _open_checkpointer(config, folder, care)
    found = _find_continued(checkpointer, config, data, care.log, say)
    prove_inputs(config, checkpointer.ranks, folder.proved, care.log, say, resuming=found is not None, beat=beat)
    beat()
    base = base_identity(config, checkpointer.ranks)
    if found is not None:
        check_base(found.meta, base, str(found.path))
    _begin_attempt(config, care, checkpointer, found, say)
    beat()
    model, optimizer = _build_trained(config, layout, found, say)
    forward, forward_backward = build_passes(config, layout, model)
    care.injector.meet(model, checkpointer, data)
    run = Run(
        config=config,
        layout=layout,
        folder=folder,
        data=data,
        heldout=heldout,
        model=model,
        optimizer=optimizer,
        forward=forward,
        forward_backward=care.injector.around(forward_backward),
        checkpointer=checkpointer,
        care=care,
        progress=progress,
        base=base,
        tokens_of_members=[0] * len(config.adapter.members),
    )
    beat()
    _continue_from(run, found, say)
    if layout.rank == 0:
        folder.write_configs(given, config)
    dist.barrier()
    # On all ranks at once: ranks that share a machine share its rate.
    dtype, budget_s = DTYPES[config.precision.compute], config.metrics.gemm_seconds
    run.gemm_tflops = measured_gemm_tflops(layout.device, dtype, budget_s=budget_s)
    return run


def _open_checkpointer(config: Config, folder: RunFolder, care: Care) -> Checkpointer:
    """Open the folder of checkpoints, and say when it has little room left."""
    checkpointer = Checkpointer(
        folder.checkpoints,
        config.checkpoint,
        timeout_s=config.fault.first_step_timeout_s,
        at=care.injector.at_stage,
        failed=care.save_failed,
    )
    if care.attempts is not None:
        _warn_of_room(config, folder.checkpoints, care.log)
    return checkpointer


def _checked_for_device(config: Config, device: torch.device, ranks_on_node: int) -> Config:
    """Refuse what this device can't do or hold; return the config with what the device decides."""
    check_compiler(config.compile, device)
    check_compiled_context(config)
    check_float8(config, device)
    check_schedule(config)
    attention_backend(config, device)
    _check_device(config, device)
    config = choose_base(config, device, ranks_on_node)
    check_memory(config, device, ranks_on_node)
    return config


def _build_trained(
    config: Config, layout: Layout, found: Found | None, say: Callable[[str], None]
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the model, filled or to be filled from a checkpoint, and the optimizer of what is trained of it."""
    model = build_model(config, layout, _fill(config, found))
    adapter = config.adapter
    if adapter.kind != "none":
        say("\n".join(trained_table(config)))
    stage = config.parallel.pp > 1
    return model, build_optimizer(model, config.optim, adapter.lora_plus_ratio, adapter.members, stage=stage)


def _continue_from(run: Run, found: Found | None, say: Callable[[str], None]) -> None:
    """Stand where the checkpoint stood, if there is one, with the roll backs that the folder knows of."""
    ranks, rollbacks = run.checkpointer.ranks, run.care.rollbacks
    if found is None:
        ranks.lead(rollbacks.forget)
        return
    run.restore(found)
    rollbacks.load(found.meta.get("rollbacks", []), ranks.lead(rollbacks.read))
    if "guard" not in found.meta:
        say(f"{found.path.name} is from before bad steps were remembered: their count starts anew")


def _begin_attempt(
    config: Config, care: Care, checkpointer: Checkpointer, found: Found | None, say: Callable[[str], None]
) -> None:
    """Write this start of the run down, unless starts like it have led nowhere, and say from where it goes on."""
    step = found.step if found is not None else 0
    productive_s = found.meta.get("productive_s", 0.0) if found is not None else 0.0
    attempts = care.attempts

    def begin() -> int:
        assert attempts is not None, "rank 0 keeps the history"
        attempts.refuse_fruitless(step, config.fault.max_fruitless_starts)
        return attempts.begin(step, productive_s)

    lost = checkpointer.ranks.lead(begin)
    if found is not None:
        say(f"continuing from {found.path}")
    if care.log.attempt > 1:
        say(f"start {care.log.attempt} of this run, {lost} steps lost")


def _open_batches(config: Config, training: bool) -> Batches | MemberBatches:
    """Open the stores, with what the objective and the adapter need of the batches."""
    adapter = config.adapter
    needed: dict[str, Any] = {
        "split": "train" if training else "heldout",
        "objective": config.objective.kind,
        "num_virtual_tokens": adapter.num_virtual_tokens if adapter.kind in ("prompt", "prefix") else 0,
        "with_places": training and adapter.kind == "lora" and adapter.dropout > 0,
    }
    if adapter.members:
        return MemberBatches(config.data, adapter.members, config.run.seed, **needed)
    return Batches(config.data, config.run.seed, **needed)


def _check_device(config: Config, device: torch.device) -> None:
    """Refuse what only GPUs have a use for."""
    asked = [f"parallel.{name}" for name in ("cpu_offload", "async_tp") if getattr(config.parallel, name)]
    if asked and device.type == "cpu":
        do = "Remove it, or run on GPUs."
        raise ConfigError([problem(name, True, "has no effect on CPUs", "", do) for name in asked])


def build_passes(config: Config, layout: Layout, model: nn.Module) -> tuple[Forward, ForwardBackward]:
    """Choose, once, how batches go through the model: directly, or stage by stage."""
    chunk_loss = compiled_chunk_loss() if config.compile.loss else chunk_cross_entropy
    head_loss = next_token(config.objective, chunk_loss, len(config.adapter.members))
    if config.parallel.pp > 1:
        return pipelined(model, layout, config.parallel, config.precision.compute, head_loss)
    return direct(model, head_loss, config.parallel.accumulate)


def _silent(text: str) -> None:
    """Say nothing: only rank 0 speaks."""


def _layout_text(layout: Layout) -> str:
    degrees = ", ".join(f"{axis} {size}" for axis, size in zip(layout.axes, layout.shape, strict=True) if size > 1)
    ranks = f"{layout.world_size} ranks" if layout.world_size > 1 else "1 process"
    return f"{ranks} on {layout.device.type}" + (f" ({degrees})" if degrees else "")


def _claim(folder: RunFolder, config: Config, heart: Heart, say: Callable[[str], None]) -> None:
    """Hold the run's folder and have its stores ready; collective."""

    def claim() -> None:
        folder.claim()
        _prepare_stores(config, heart, say)
        prove_tokenizers(config)

    heart.beat(0, "build")
    # Preparing may take as long as it takes; for what else rank 0 does, nobody waits for ever.
    rank_0_first(claim, config.fault.first_step_timeout_s / 4, lambda: heart.beat(0, "build"), heart.is_overdue)


def _prepare_stores(config: Config, heart: Heart, say: Callable[[str], None]) -> None:
    for store in config.data.stores:
        if store.sources and not Path(store.path).exists():
            say(f"preparing {store.path} from {', '.join(store.sources)}")
            heart.beat(0, "start")
            prepare_from_config(store)
            heart.beat(0, "build")
            say(f"prepared {store.path}")


def _warn_of_room(config: Config, folder: Path, log: FaultLog) -> None:
    """Say, while it is early, that the disk has no room for the checkpoints that are to be kept; on rank 0."""
    there, kept = len(list_steps(folder)), config.checkpoint.keep_last
    missing = max(1, kept + 1 - there)  # the oldest goes when the next one is written
    needed, (free, _) = missing * saved_bytes(config), free_space(folder)
    if free < needed:
        what = (
            f"{folder}: the disk has {free / 1e9:.3g} GB free, and {missing} more checkpoints take {needed / 1e9:.3g}"
        )
        do = "Free some space, lower checkpoint.keep_last, or put run.dir on a larger disk."
        log.own("disk_space", what, "The run goes on; a save that finds no room writes nothing", do)


def _heldout(config: Config, layout: Layout) -> Callable[[], Iterable[Batch]]:
    """Make the reader of the held-out batches, which starts over at each call."""
    if not config.eval.every_steps:
        return list
    batches = _open_batches(config, training=False)
    return partial(
        batches.heldout_microbatches,
        layout.dp_rank,
        layout.dp_size,
        config.data.micro_batch_size,
        config.eval.max_sequences,
    )


def _check_vocabulary(config: Config, data: Batches | MemberBatches) -> None:
    """Refuse a model with fewer rows than the tokenizer has tokens."""
    tokens = data.vocab_size
    if config.model.vocab_size < tokens:
        expected = f"must be at least the {tokens} tokens of the stores' tokenizer"
        why = "a token without a row can't be looked up"
        raise ConfigError(
            problem("model.vocab_size", config.model.vocab_size, expected, why, f"Use --model.vocab_size {tokens}.")
        )


def _find_continued(
    checkpointer: Checkpointer,
    config: Config,
    data: Batches | MemberBatches,
    log: FaultLog,
    say: Callable[[str], None],
) -> Found | None:
    """Find the newest good checkpoint of the folder; refuse a config that doesn't continue it."""
    found = checkpointer.find_latest()
    if found is None:
        return None
    for text in found.refused:
        say(f"refused {text}")
        if log.rank == 0:
            log.own(
                "checkpoint_refused", text, f"went on from {found.path.name}", file=str(found.path.parent), said=False
            )
    saved = found.meta["config"]
    problems = resume_differences(saved, config) + _other_data(data, found)
    if problems:
        head = f"{found.path} can't be continued with this config:"
        do = "Give the run's own values, or another --run.name to start a new run."
        raise ConfigError([head, *(f"  {text}" for text in problems), do])
    if found.step > config.run.steps:
        do = f"Use --run.steps {found.step} or more, or another --run.name."
        raise ConfigError(problem("run.steps", config.run.steps, f"{found.path} is further already", "", do))
    notice = curve_notice(saved, config)
    if notice:
        say(notice)
    return found


def _fill(config: Config, found: Found | None) -> Fill:
    """Choose what fills the parameters; a checkpoint holds them all, or all but a base."""
    if found is None:
        return starting_weights(config)
    if config.adapter.kind == "none":
        return _leave_unfilled
    return starting_weights(replace(config, adapter=replace(config.adapter, init_from="")))


def _leave_unfilled(local: torch.Tensor, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    """Leave a parameter to the checkpoint."""


def _other_data(data: Batches | MemberBatches, found: Found) -> list[str]:
    """Name the stores whose content is not what the checkpoint was trained on."""
    saved, now = found.meta["data"], data.fingerprints
    if len(saved) != len(now):
        return []  # the number of stores is a difference of the config already
    if found.meta["tokenizer"] != data.tokenizer_hash:
        return ["data.stores: made with another tokenizer than the checkpoint's"]
    return [
        f"data.stores.{index}: the checkpoint was trained on other data (its hash {before[:12]}, now {after[:12]})"
        for index, (before, after) in enumerate(zip(saved, now, strict=True))
        if before != after
    ]
