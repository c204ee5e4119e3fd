"""What a layout must satisfy: degrees that multiply to the ranks, and parts of the model that divide among them.

Each rule gets the config and the number of ranks and yields its problems, each with the degrees that work; a rule that
can't be judged because another number is wrong keeps silent. Combinations that no number mends are in refusals.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

from configs.errors import problem
from configs.fields import choices, default_value, divisors, listed, plain
from configs.schema import Config, ModelConfig, ParallelConfig

SINGLE_STAGE_SCHEDULES = ("GPipe", "1F1B")
V_SCHEDULES = ("ZBVZeroBubble", "DualPipeV")
ZERO_BUBBLE_SCHEDULES = ("InterleavedZeroBubble", *V_SCHEDULES)
"""Schedules that compute the gradients of weights apart from those of activations."""

NF4_BLOCK = 64
"""Inputs of a row that share a scale; a projection whose inputs are no multiple of it is not quantised."""

_TRIED = 64
"""Options that are tried for an answer."""

Works = Callable[[Config, int, str, Sequence[int]], Sequence[int]]
"""(config, ranks, field, options) -> the options to name in an answer."""


def head_dim(model: ModelConfig) -> int:
    """Give the width of a head."""
    return model.head_dim or model.dim // max(model.num_heads, 1)


def stages_per_rank(parallel: ParallelConfig) -> int:
    """Count the stages of each pipeline rank."""
    if parallel.pp == 1:
        return 1
    needed = 2 if not parallel.schedule_csv and parallel.schedule not in SINGLE_STAGE_SCHEDULES else 1
    return parallel.stages_per_rank or needed


def _degrees(config: Config, world_size: int, works: Works) -> Iterator[str]:
    parallel = config.parallel
    degrees = {axis: getattr(parallel, axis) for axis in ("dp_replicate", "cp", "tp", "pp")}
    if min(degrees.values()) < 1 or parallel.dp_shard < -1:
        return
    ranks, product = _ranks(world_size), prod(degrees.values())
    above = {f"parallel.{axis}": degree for axis, degree in degrees.items() if degree > 1}
    if parallel.dp_shard == 0:
        do = "Use -1 for the rest of the ranks."
        yield problem("parallel.dp_shard", 0, "must be -1 or at least 1", do=do)
    elif world_size % product and len(above) == 1:
        name, degree = next(iter(above.items()))
        do = f"Use {choices(works(config, world_size, name, divisors(world_size)), degree)}."
        yield problem(name, degree, f"must divide the {ranks}", _WHY[name], do)
    elif world_size % product:
        near = [count for count in (world_size - world_size % product, world_size + product - world_size % product)]
        ways = [f"start {listed([count for count in near if count], 'or')} ranks"]
        for name, degree in above.items():
            fitting = [other for other in divisors(world_size) if world_size % (product // degree * other) == 0]
            if fitting:
                ways.append(f"use {name} {choices(works(config, world_size, name, fitting), degree)}")
        do = f"{listed(ways, 'or').capitalize()}."
        where = f"{' * '.join(above)} = {' * '.join(str(degree) for degree in above.values())}"
        yield problem(where, product, f"must divide the {ranks}", do=do)
    elif parallel.dp_shard > 0 and product * parallel.dp_shard != world_size:
        times = " * ".join(f"{name} = {degree}" for name, degree in above.items()) or "parallel.dp_replicate = 1"
        expected = f"times {times} must be the {ranks}"
        do = f"Use {world_size // product}, or -1 for the rest, or start {_ranks(product * parallel.dp_shard)}."
        yield problem("parallel.dp_shard", parallel.dp_shard, expected, do=do)


_WHY = {
    "parallel.dp_replicate": "replicas are of one size",
    "parallel.cp": "each group of that many ranks shares its sequences",
    "parallel.tp": "each group of that many ranks shares its matrices",
    "parallel.pp": "each pipeline has that many ranks",
}


def _tensor(config: Config, world_size: int, works: Works) -> Iterator[str]:
    model, tp = config.model, config.parallel.tp
    if tp < 2 or min(model.num_heads, model.ffn_dim, model.vocab_size) < 1 or model.num_kv_heads < 0:
        return
    kv_heads = model.num_kv_heads or model.num_heads
    numbers = {"num_heads": model.num_heads, "ffn_dim": model.ffn_dim, "vocab_size": model.vocab_size}
    undivided = {name: number for name, number in numbers.items() if number % tp}
    if undivided or (kv_heads % tp and tp % kv_heads):
        names = [f"model.{name} = {number}" for name, number in undivided.items()]
        expected = f"must divide {listed(names, 'and')}" if names else ""
        if kv_heads % tp and tp % kv_heads:
            expected += " and " * bool(names) + f"must divide model.num_kv_heads = {kv_heads} or be a multiple of it"
        divide = [
            degree
            for degree in divisors(model.num_heads)
            if not any(number % degree for number in numbers.values())
            and (kv_heads % degree == 0 or degree % kv_heads == 0)
        ]
        why = "each rank holds whole heads, and as many columns and tokens of the vocabulary as the others"
        degrees = choices(works(config, world_size, "parallel.tp", divide), tp)
        do = f"Use {degrees}."
        if list(undivided) == ["vocab_size"]:  # rows without a token cost little
            do = f"Use model.vocab_size {-(-model.vocab_size // tp) * tp}, or parallel.tp {degrees}."
        yield problem("parallel.tp", tp, expected, why, do)


def _sequence_parts(config: Config, world_size: int, works: Works) -> Iterator[str]:
    seq_len, cp, tp = config.data.seq_len, config.parallel.cp, config.parallel.tp
    if min(seq_len, cp, tp) < 1 or cp * tp == 1:
        return
    parts = {"2 * parallel.cp": 2 * cp if cp > 1 else 1, "parallel.cp * parallel.tp": cp * tp if tp > 1 else 1}
    reasons = {
        "2 * parallel.cp": "each rank takes a chunk of a sequence's head and one of its tail",
        "parallel.cp * parallel.tp": "between the matrices each rank holds as many tokens as the others",
    }
    for name, count in parts.items():
        if seq_len % count:
            below = seq_len - seq_len % count
            near = [length for length in (below, below + count) if length]
            yield problem(
                "data.seq_len", seq_len, f"must be a multiple of {name} = {count}", reasons[name],
                f"Use {listed(near, 'or')}.",
            )  # fmt: skip


def _stages(config: Config, world_size: int, works: Works) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    if min(parallel.pp, layers) < 1 or parallel.stages_per_rank < 0:
        return
    if parallel.pp == 1:
        for name in ("schedule", "schedule_csv", "stages_per_rank", "layers_per_stage"):
            value = plain(getattr(parallel, name))
            if value != plain(default_value(parallel, name)):
                yield problem(f"parallel.{name}", value, "has no effect while parallel.pp = 1", do="Remove it.")
        return
    per_rank, schedule = stages_per_rank(parallel), parallel.schedule
    if not parallel.schedule_csv:
        if schedule in SINGLE_STAGE_SCHEDULES and per_rank != 1:
            do = "Use 1, or a schedule that loops: Interleaved1F1B, LoopedBFS or InterleavedZeroBubble."
            expected = f"must be 1 under parallel.schedule = {schedule!r}"
            yield problem("parallel.stages_per_rank", per_rank, expected, do=do)
        elif schedule in V_SCHEDULES and per_rank != 2:
            why = "each rank has one stage on the way down and one on the way up"
            yield problem("parallel.stages_per_rank", per_rank, f"must be 2 under {schedule!r}", why, "Use 2.")
    stages = parallel.pp * per_rank
    counts = parallel.layers_per_stage
    if stages > layers:
        most = layers // per_rank
        fit = works(config, world_size, "parallel.pp", range(max(1, most - _TRIED), most + 1))
        do = f"Use {choices(fit, parallel.pp)}." if fit else "Use fewer stages_per_rank."
        where = f"parallel.pp * stages_per_rank = {parallel.pp} * {per_rank}"
        yield problem(where, "", f"must be at most model.num_layers = {layers}", "each stage has a layer at least", do)
    elif counts and (len(counts) != stages or sum(counts) != layers or min(counts) < 1):
        expected = f"must be {stages} counts of at least 1 whose sum is model.num_layers = {layers}"
        why = f"parallel.pp = {parallel.pp} with {per_rank} a rank makes {stages} stages"
        yield problem("parallel.layers_per_stage", list(counts), expected, why)


def _microbatches(config: Config, world_size: int, works: Works) -> Iterator[str]:
    """What a schedule asks of the number of microbatches."""
    parallel, data = config.parallel, config.data
    dp_size = _dp_size(config, world_size)
    if parallel.pp < 2 or not dp_size or data.global_batch_size < 1 or data.micro_batch_size < 0:
        return
    share = data.global_batch_size // dp_size
    micro = data.micro_batch_size or 1
    if share % micro or not share or data.global_batch_size % dp_size:
        return
    count, stages = share // micro, parallel.pp * stages_per_rank(parallel)
    sizes = [size for size in divisors(share) if _runs(parallel, share // size)]
    sizes = works(config, world_size, "data.micro_batch_size", sizes)
    if not _runs(parallel, count):
        expected = {
            True: f"must be a multiple of {count // parallel.pp}, its rounds of parallel.pp = {parallel.pp}",
            False: f"must be at least {parallel.pp if parallel.schedule == '1F1B' else stages}, one a stage",
        }[parallel.schedule in ("Interleaved1F1B", "InterleavedZeroBubble")]
        where = f"microbatches of a step under parallel.schedule = {parallel.schedule!r}"
        do = f"Use data.micro_batch_size {choices(sizes, micro)}." if sizes else "Raise data.global_batch_size."
        yield problem(where, count, expected, do=do)


def _runs(parallel: ParallelConfig, microbatches: int) -> bool:
    """Say whether the schedule can be built for so many microbatches (torch.distributed.pipelining.schedules)."""
    if parallel.schedule_csv:
        return True
    if parallel.schedule == "1F1B":
        return microbatches >= parallel.pp
    if parallel.schedule == "DualPipeV":
        return microbatches >= 2 * parallel.pp
    if parallel.schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        return microbatches % max(1, microbatches // parallel.pp) == 0
    return True


def _parts(config: Config, world_size: int, works: Works) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    sizes = (model.dim, model.num_heads, model.ffn_dim, model.vocab_size)
    others = parallel.dp_replicate * parallel.tp * parallel.pp
    if min(*sizes, others) < 1 or min(model.num_kv_heads, model.head_dim) < 0 or world_size % others:
        return
    kv_heads = model.num_kv_heads or model.num_heads
    rows = {
        "num_kv_heads * head_dim": kv_heads * head_dim(model) // (parallel.tp if kv_heads % parallel.tp == 0 else 1),
        "dim": model.dim,
        "ffn_dim": model.ffn_dim // parallel.tp,
        "vocab_size": model.vocab_size // parallel.tp,
    }
    name, fewest = min(rows.items(), key=lambda item: item[1])
    shard = world_size // others
    if parallel.dp_shard in (-1, shard // max(parallel.cp, 1)) and shard > fewest >= 1:
        fit = [degree for degree in divisors(world_size // (others // parallel.dp_replicate))
                 if world_size // (others // parallel.dp_replicate) // degree <= fewest]  # fmt: skip
        part = f" / parallel.tp = {fewest}" if parallel.tp > 1 and name != "dim" else f" = {fewest}"
        where = "parallel.dp_shard" if parallel.cp == 1 else "parallel.dp_shard * cp"
        expected = f"must be at most model.{name}{part}"
        why = f"a parameter has so few rows, and each of the {shard} ranks of a replica holds some"
        fit = works(config, world_size, "parallel.dp_replicate", fit)
        do = f"Use parallel.dp_replicate {choices(fit, parallel.dp_replicate)}."
        yield problem(where, shard, expected, why, do)


def _batch(config: Config, world_size: int, works: Works) -> Iterator[str]:
    batch, micro = config.data.global_batch_size, config.data.micro_batch_size
    dp_size = _dp_size(config, world_size)
    if batch < 1 or micro < 0 or not dp_size:
        return
    ranks = _ranks(world_size) if dp_size == world_size else f"{dp_size} data-parallel rank{'s' * (dp_size > 1)}"
    share, rest = divmod(batch, dp_size)
    if rest:
        near = [count for count in (batch - rest, batch - rest + dp_size) if count]
        times = world_size // dp_size
        do = f"Use {listed(near, 'or')}, or start {choices([n * times for n in divisors(batch)], world_size)} ranks."
        expected = f"must be a multiple of the {ranks}"
        yield problem("data.global_batch_size", batch, expected, "every rank computes the same number of sequences", do)
    elif micro and share % micro:
        expected = f"must divide the {share} of {batch} sequences that a rank computes"
        sizes = works(config, world_size, "data.micro_batch_size", divisors(share))
        yield problem("data.micro_batch_size", micro, expected, do=f"Use {choices(sizes, micro)}.")
    elif config.parallel.accumulate == "unsharded" and (micro or (share if config.parallel.pp < 2 else 1)) == share:
        expected = f"has no effect while a rank computes its {share} of {batch} sequences at once"
        sizes = works(config, world_size, "data.micro_batch_size", divisors(share)[:-1])
        do = f"Use {f'data.micro_batch_size {choices(sizes, share)}' if sizes else 'fewer ranks'}, or 'sharded'."
        yield problem("parallel.accumulate", "unsharded", expected, do=do)


def _blocks(config: Config, world_size: int, works: Works) -> Iterator[str]:
    """What NF4 asks of the parts of rows: o_proj and down_proj are cut by their inputs."""
    model, tp = config.model, config.parallel.tp
    if config.adapter.quantization != "nf4" or tp < 2 or min(model.num_heads, model.ffn_dim) < 1:
        return
    inputs = {"num_heads * head_dim": model.num_heads * head_dim(model), "ffn_dim": model.ffn_dim}
    inputs = {name: count for name, count in inputs.items() if count >= 1 and count % NF4_BLOCK == 0}  # others stay
    cut = [f"model.{name} = {count}" for name, count in inputs.items() if count % (NF4_BLOCK * tp)]
    if cut and not any(count % tp for count in inputs.values()):
        fit = [one for one in divisors(model.num_heads) if not any(n % (NF4_BLOCK * one) for n in inputs.values())]
        expected = f"must leave each rank a multiple of {NF4_BLOCK} of {listed(cut, 'and')}"
        why = f"under adapter.quantization = 'nf4' {NF4_BLOCK} inputs share a scale"
        do = f"Use {choices(works(config, world_size, 'parallel.tp', fit), tp)}."
        yield problem("parallel.tp", tp, expected, why, do)


def _one_rank(config: Config, world_size: int, works: Works) -> Iterator[str]:
    if config.optim.kind == "paged_adamw_8bit" and world_size > 1:
        why = (
            "bitsandbytes cuts 8-bit state into blocks along each rank's own shard: the run would depend on the layout"
        )
        expected = f"needs 1 rank, not {world_size}"
        yield problem("optim.kind", "paged_adamw_8bit", expected, why, "Start 1 rank, or use 'adamw' or 'lion'.")


_RULES = (_degrees, _tensor, _sequence_parts, _stages, _microbatches, _parts, _batch, _blocks, _one_rank)


def layout_problems(config: Config, world_size: int) -> list[str]:
    """List what is wrong with a config on so many ranks, each with values that work."""
    return [text for rule in _RULES for text in rule(config, world_size, _that_work)]


def _that_work(config: Config, world_size: int, key: str, options: Sequence[int]) -> Sequence[int]:
    """Keep the options that leave no other rule anything to say; else those that leave nothing about this field.

    Of many, those next to what was given are tried. Where none works, others must change first: all are kept.
    """
    section, _, name = key.partition(".")
    table = getattr(config, section)
    nearest = sorted(options, key=lambda option: abs(option - getattr(table, name)))[:_TRIED]
    left: dict[int, list[str]] = {}
    for option in nearest:
        changed = replace(config, **{section: replace(table, **{name: option})})
        left[option] = [text for rule in _RULES for text in rule(changed, world_size, _all_of_them)]
    for about in ("", "parallel.", f"{key} "):
        works = sorted(option for option in nearest if not any(text.startswith(about) for text in left[option]))
        if works:
            return works
    return options


def _all_of_them(config: Config, world_size: int, key: str, options: Sequence[int]) -> Sequence[int]:
    """Keep every option: inside of a trial nobody reads the advice."""
    return options


def _dp_size(config: Config, world_size: int) -> int:
    """Count the ranks that see different sequences; 0 where the degrees don't fit the ranks."""
    parallel = config.parallel
    others = parallel.cp * parallel.tp * parallel.pp
    if min(parallel.cp, parallel.tp, parallel.pp) < 1 or world_size % others:
        return 0
    return world_size // others


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
