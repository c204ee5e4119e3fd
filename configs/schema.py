"""What a run is: one frozen dataclass a section, one docstring a field.

A field made by `fixed(...)` must keep its value when a run is resumed, because the weights or the token stream depend
on it; every other field may change from one start of a run to the next. Nothing mutates a config: `check.resolve`
derives a new one. A function receives its section, not the run.
"""

from dataclasses import dataclass, field
from typing import Literal

from configs.adapters import AdapterConfig
from configs.faults import FaultConfig
from configs.fields import fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """The run itself."""

    name: str = "run"
    """Folder of the run below `dir`; the same name again continues the run. Letters, digits, '.', '_' and '-'."""
    dir: str = "runs"
    """Folder that holds all runs."""
    steps: int
    """Optimizer steps in all, counted from the first. A longer run under a decaying lr schedule is another curve."""
    seed: int = fixed(0)
    """Initial weights and the order of the data are functions of this number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live: auto takes CUDA devices when there are any."""
    threads: int = 0
    """CPU threads of each rank; 0 shares the machine's cores evenly among its ranks."""
    private: bool = True
    """Only this user can read what the run writes; false lets the user's group read it too."""
    deterministic: bool = False
    """Only kernels that give the same bits each time (on CPUs, with equal threads, they do anyway)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScalingConfig:
    """Llama-3 scaling of the rotary frequencies (Hugging Face's `rope_type: llama3`)."""

    factor: float = fixed(8.0)
    """Wavelengths above the original context are stretched by this factor."""
    low_freq_factor: float = fixed(1.0)
    """Wavelengths longer than original_max_seq_len / this are scaled in full."""
    high_freq_factor: float = fixed(4.0)
    """Wavelengths shorter than original_max_seq_len / this stay as they are."""
    original_max_seq_len: int = fixed(8192)
    """Context length, in tokens, that the frequencies were first trained for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder."""

    kind: Literal["llama"] = fixed("llama")
    """Which decoder of models/ is built."""
    vocab_size: int = fixed()
    """Rows of the embedding; at least as many as the tokenizer has tokens."""
    dim: int = fixed()
    """Width of the residual stream."""
    num_layers: int = fixed()
    """Decoder blocks."""
    num_heads: int = fixed()
    """Query heads."""
    num_kv_heads: int = fixed(0)
    """Key and value heads (grouped-query attention); 0 means as many as query heads."""
    head_dim: int = fixed(0)
    """Width of a head; 0 means dim / num_heads. Even, because rotary positions turn pairs."""
    ffn_dim: int = fixed()
    """Width inside the SwiGLU feed-forward."""
    max_seq_len: int = fixed(2048)
    """Longest sequence, in tokens, that the model is meant for."""
    rope_theta: float = fixed(10000.0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = fixed(None)  # noqa: RUF009 - `fixed` makes a field
    """Llama-3 frequency scaling; absent means none."""
    norm_eps: float = fixed(1e-5)
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = fixed(False)
    """The head uses the embedding's weight."""
    attention_bias: bool = fixed(False)
    """Biases on the query, key, value and output projections."""
    mlp_bias: bool = fixed(False)
    """Biases on the three feed-forward projections."""
    init_std: float = fixed(0.02)
    """Standard deviation of the initial weights; the projections back into the residual stream get
    init_std / sqrt(2 * num_layers)."""
    init_from: str = ""
    """Folder with a Hugging Face Llama to start from; empty draws the weights from run.seed. Read at step 0 only."""
    attention: Literal["auto", "sdpa", "blocked", "flex", "varlen", "flash"] = "auto"
    """Kernel of attention. sdpa: torch's; documents run blocked under it. blocked: blocks of queries with recomputed
    scores, exact on any device. flex: FlexAttention, on GPUs. varlen: torch's variable-length flash kernel, and flash:
    the flash-attn package, on GPUs in 16 bits. auto: on GPUs flex where documents are kept apart, else sdpa; on CPUs
    blocked where blocks are compiled, else sdpa."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """One token store and, if it should be made on first use, what it is made from."""

    path: str
    """Folder that tools/prepare.py wrote."""
    weight: float = fixed(1.0)
    """Share of this store in the mix, relative to the others."""
    sources: tuple[str, ...] = ()
    """Files and folders to prepare the store from when `path` does not exist; `python-stdlib` names the sources of
    Python's own standard library, `python-stdlib-docs` questions about its functions and their answers. For small
    corpora: the other ranks wait; prepare large ones with tools/prepare.py."""
    tokenizer: str = ""
    """Tokenizer for that preparation: a sentencepiece .model or a tokenizer.json."""
    train_tokenizer: int = 0
    """Train a sentencepiece tokenizer of this many tokens on the sources instead."""
    max_bytes: int = 0
    """Stop preparing after this many bytes of text; 0 takes everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Token stores and how sequences are cut from them."""

    stores: tuple[StoreConfig, ...] = fixed(factory=tuple)
    """Token stores, mixed by weight."""
    seq_len: int = fixed()
    """Tokens a sequence."""
    global_batch_size: int = fixed()
    """Sequences a step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences a rank computes at once; 0 means its whole share of the step (no accumulation)."""
    packing: Literal["concat", "best_fit", "none"] = fixed("concat")
    """concat: documents end to end, cut every seq_len tokens. best_fit: whole documents packed into sequences; only
    documents longer than seq_len are cut. none: one document a sequence, padded."""
    document_mask: bool = fixed(False)
    """Attention does not cross documents."""
    document_positions: bool = fixed(False)
    """Positions start at 0 in each document."""
    verify: Literal["hashes", "sizes"] = "hashes"
    """hashes: a start proves every file of the stores by its sha256, the ranks sharing them (1.2 to 1.8 GB/s a core),
    and remembers in the run folder what it has proved. sizes: by its size only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """What is minimised."""

    kind: Literal["next_token", "sft"] = fixed("next_token")
    """next_token: cross entropy of every next token. sft: of the answers' tokens only, as a store of examples marks
    them."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at once; the logits of a whole batch never do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    kind: Literal["adamw", "muon", "lion", "apex", "adamw_8bit", "paged_adamw_8bit"] = fixed("adamw")
    """adamw: AdamW, fused where torch has it. muon: Muon for the matrices of the layers, AdamW for embedding, head,
    norms and biases. lion: the sign of a momentum, half of AdamW's state. apex: AdamW by NVIDIA's apex, on CUDA.
    adamw_8bit: refused, since its state depends on the layout. paged_adamw_8bit: bitsandbytes' AdamW with 8-bit state
    that the GPU may page out; one process only."""
    lr: float = fixed(3e-4)
    """Peak learning rate, one for all parameters: Muon's updates are scaled to the size of AdamW's. Lion wants 3 to 10
    times less than AdamW."""
    beta1: float = fixed(0.9)
    """Decay of the first moment; under lion its weight in the update."""
    beta2: float = fixed(0.95)
    """Decay of the second moment; under lion of its momentum, 0.99 in the paper."""
    eps: float = fixed(1e-8)
    """Added to the root of the second moment; lion has none."""
    momentum: float = fixed(0.95)
    """Decay of Muon's momentum."""
    weight_decay: float = fixed(0.1)
    """Decoupled weight decay of matrices; norms and biases get none. Lion wants 3 to 10 times more than AdamW."""
    max_grad_norm: float = fixed(1.0)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LrConfig:
    """The learning rate as a function of the step."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = fixed("cosine")
    """After the warmup: cosine or linear down to min_ratio at the last step, constant, or wsd (warmup-stable-decay:
    constant, then linear down over the last decay_steps)."""
    warmup_steps: int = fixed(0)
    """Steps of linear warmup from 0 to optim.lr."""
    decay_steps: int = fixed(0)
    """Steps of the final decay of wsd."""
    min_ratio: float = fixed(0.1)
    """Learning rate at the end, relative to the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of the mesh and how the model, its gradients and its sequences are laid out over it."""

    dp_replicate: int = 1
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks a replica is sharded over (FSDP2); -1 takes the rest."""
    cp: int = 1
    """Ranks that share each sequence (context parallelism); parameters are sharded over them too."""
    tp: int = 1
    """Ranks that share each matrix and, between the matrices, each sequence (tensor and sequence parallelism)."""
    pp: int = 1
    """Ranks that share the layers (pipeline parallelism)."""
    schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """Order of the pipeline's microbatches; GPipe and 1F1B have one stage a rank, ZBVZeroBubble and DualPipeV two."""
    schedule_csv: str = ""
    """File with a schedule of one's own, one row a rank, in the format of torch's pipeline schedules; instead of
    `schedule`."""
    stages_per_rank: int = 0
    """Stages of each pipeline rank under a schedule that loops; 0 takes one, or two where the schedule needs them."""
    layers_per_stage: tuple[int, ...] = ()
    """Layers of each stage, first to last; empty splits by cost, the embedding and the head counted in."""
    async_tp: bool = False
    """Overlap tensor parallelism's collectives with its matrix products; on GPUs, with compile.blocks."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward and gather them again for the backward."""
    prefetch_blocks: int = 0
    """Blocks whose parameters are gathered ahead of their turn, explicitly; 0 leaves it to FSDP2, which gathers one
    ahead."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory; the device holds what is gathered."""
    accumulate: Literal["sharded", "unsharded"] = "sharded"
    """sharded: each microbatch's gradient is reduce-scattered into the fp32 shard. unsharded: gradients are reduced
    once a step, at the price of a whole fp32 gradient on each rank; runs of adapter.kind lora, bottleneck, prefix,
    prompt and bitfit, which train little, always do so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeConfig:
    """Activations that the backward pass computes again instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """none keeps all. full keeps a block's input only. selective keeps attention and every other matrix product of a
    block and computes the rest again."""
    every_blocks: int = 1
    """Recompute every n-th block; 1 is every block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """Number formats. Master weights and optimizer state follow `master`."""

    compute: Literal["bf16", "fp32", "fp64"] = fixed("bf16")
    """Format of parameters and activations in the forward and backward pass."""
    master: Literal["fp32", "fp64"] = fixed("fp32")
    """Format of the weights that the optimizer updates, and of the gradient reduction; fp64 is for proofs."""
    float8: Literal["none", "tensorwise", "rowwise"] = fixed("none")
    """Compute the blocks' linear layers in float8, scaled by tensor or by row (torchao); on GPUs of compute capability
    8.9 or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """torch.compile; needs a C++ compiler on CPUs and Triton on GPUs."""

    blocks: bool = False
    """Compile the decoder blocks, one graph for all of them."""
    loss: bool = False
    """Compile the cross entropy of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Saved state."""

    every_steps: int = 100
    """Steps between checkpoints; the last step is always saved. 0 saves the last step only."""
    keep_last: int = 2
    """Newest checkpoints that are kept; at least 1."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest held-out loss."""
    asynchronous: bool = True
    """Write in the background; the step waits for the copy to host memory only."""
    max_failures: int = 3
    """Saves in a row that may fail (a full disk) before the run ends; that of the last step or of a stop never may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """What is measured and where it goes."""

    every_steps: int = 10
    """Steps between logged steps; only they synchronise with the device."""
    tensorboard: bool = True
    """Write TensorBoard files beside metrics.jsonl."""
    peak_tflops: float = 0.0
    """Dense peak of one device in compute precision, TFLOP/s; 0 looks the device up, or measures the GEMM rate."""
    gemm_seconds: float = 1.2
    """Seconds, about, that each start takes to measure the GEMM rate; less time measures smaller products."""
    gc_every_steps: int = 100
    """Python's garbage collector runs at these steps only, on every rank at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Loss on held-out documents."""

    every_steps: int = 100
    """Steps between evaluations; the first and the last step are always evaluated. 0 turns evaluation off."""
    max_sequences: int = 64
    """Held-out sequences an evaluation reads; 0 reads all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run, whole."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lr: LrConfig = field(default_factory=LrConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
