"""The run configuration: every setting of a run, its type, its default and its meaning.

Plain dataclasses without torch, so that a bad configuration is refused in milliseconds. A setting's type states its
range (`fields`); `loader` loads settings, and `validation` checks them against one another.
Names are megatron-core's where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from plt_megatron.config.fields import (
    REFUSED,
    BelowOne,
    Count,
    Finite,
    LoopCount,
    Minutes,
    NotEmpty,
    NotNegative,
    Positive,
    PositiveCount,
    PositiveSteps,
    Range,
    Ranks,
    Seconds,
    Share,
    Size,
    Steps,
    TokenCount,
)
from plt_megatron.config.presets import LOOP_PRESETS


@dataclass
class YarnConfig:
    """YaRN (arXiv 2309.00071): interpolates dimensions that rotate slowly over the original length."""

    original_max_position_embeddings: Size  # context length that RoPE was trained with, in tokens
    beta_fast: Positive = 32.0  # dimensions with at least this many rotations over that length are not interpolated
    beta_slow: Positive = 1.0  # dimensions with at most this many rotations are fully interpolated
    correction_range_round_to_int: bool = True  # round the ends of the ramp to whole dimensions


@dataclass
class RopeScalingConfig:
    """RoPE scaling for contexts longer than it was trained with: Llama 3.1's or YaRN (docs/model.md)."""

    factor: Annotated[float, Range(1)]  # target length / trained length; the latter is 8,192 in Llama 3.1
    yarn: YarnConfig | None = None  # null: Llama 3.1's


@dataclass
class MoeConfig:
    """Mixture of experts (docs/moe.md): a layer's FFN becomes `num_experts` experts; a token uses `router_topk`.

    Names are megatron-core's without `moe_`.
    """

    num_experts: Annotated[int, Range(2, 2**16)]
    first_k_dense_replace: Count = 0  # first layers that have a dense FFN of model.ffn_hidden_size instead
    router_topk: Size = 2  # experts a token is sent to
    ffn_hidden_size: Size | None = None  # per expert; null: model.ffn_hidden_size
    shared_expert_intermediate_size: Size | None = None  # of an additional expert that every token uses; null: none
    # softmax: over the chosen experts; pre_softmax: over all, before some are chosen; sigmoid: scores each expert
    # by itself, a chosen one's weight is its share of the chosen scores (of one: its score).
    router_score_function: Literal["softmax", "pre_softmax", "sigmoid"] = "softmax"
    # Balance the load over each sequence (independent of layout and micro-batch size), or over each microbatch.
    router_load_balancing_type: Literal["seq_aux_loss", "aux_loss", "none"] = "seq_aux_loss"
    aux_loss_coeff: NotNegative = 0.01
    z_loss_coeff: NotNegative = 0.0  # keeps the router's logits small
    # Update rate of a bias per expert that balances the load: added to scores only to choose experts, raised after a
    # step that gave the expert less than an even load over all loops, else lowered. Needs sigmoid; DeepSeek-V3: 1e-3;
    # null: no bias.
    router_bias_update_rate: Positive | None = None
    expert_capacity_factor: Positive | None = None  # an expert drops tokens beyond this times an even load; null: none


@dataclass
class ModelConfig:
    """A Parallel Loop Transformer (arXiv 2510.24824): a decoder whose layers run `loop_count` times.

    `loop_count: 1` is a plain transformer (RMSNorm, SwiGLU, GQA, RoPE) without extra parameters.
    """

    PRESETS: ClassVar = {"loop_preset": LOOP_PRESETS}

    num_layers: Annotated[int, Range(1, 10_000)] = 4
    hidden_size: Size = 128
    ffn_hidden_size: Size = 384
    num_attention_heads: Size = 4
    num_query_groups: Size | None = None  # key/value heads; null: as many as attention heads
    kv_channels: Size | None = None  # head dimension; null: hidden_size // num_attention_heads
    vocab_size: Size | None = None  # null: the tokenizer's
    make_vocab_size_divisible_by: Size = 128  # the embedding is padded to a multiple of this times TP
    share_embeddings_and_output_weights: bool = True  # tied embeddings
    rotary_base: Positive = 10000.0
    rope_scaling: RopeScalingConfig | None = None  # for longer contexts; null: none
    layernorm_epsilon: Positive = 1e-5
    qkv_bias: bool = False  # biases on the Q, K and V projections (Qwen2)
    qk_layernorm: bool = False  # RMSNorm on each head's Q and K
    # pre: norms on the inputs of attention and FFN; pre_ffn_output: also on the FFN's output, before the residual is
    # added; post: on the outputs instead of the inputs, and qk_layernorm over all heads (OLMo-2).
    norm_placement: Literal["pre", "pre_ffn_output", "post"] = "pre"
    # Take keys from the previous token (model/attention.py): those of half the groups, the slow half of each key's
    # channels, or a learned share.
    key_shift: Literal["none", "heads", "channels", "learned"] = "none"
    init_method_std: Positive = 0.02
    # The loop (paper section 3; published variants: see docs/model.md).
    # Expands to settings of the loop (config/presets.py); settings in the same file override it.
    loop_preset: Literal["paper", "loopcoder", "recommended"] | None = None
    loop_count: LoopCount = 2
    # Layers [first, last) that loop, as in [1, 7]. Earlier layers (prelude) run once, and loops read their output
    # instead of the embeddings; later layers (coda) run once after the last loop. null: all layers loop.
    loop_span: list[Count] | None = None
    # layer: each layer runs all its loops before the next (1, 1, 2, 2), without cross_loop_parallel.
    loop_order: Literal["stack", "layer"] = "stack"
    cross_loop_parallel: bool = True  # loop l reads E + shift(h of loop l-1); False: h itself
    input_injection: bool = False  # even without cross_loop_parallel, loop l reads E + h instead of h
    share_kv: bool = True  # loops >= 2 attend to the first loop's K and V
    share_values: bool = True  # False: loops >= 2 attend to the first loop's K and their own V
    gated_window: bool = True  # loops >= 2 also attend to a window of their own, blended in by a gate per head
    # last_loop: earlier loops attend only within a window, and no loop reads another's K and V (share_kv=false,
    # gated_window=false). The KV cache is then the last loop's, and as large as with share_kv.
    full_attention: Literal["every_loop", "last_loop"] = "every_loop"
    window_size: Size = 64  # keys that a query sees in the window, its own included
    fused_gated_window: bool = False  # window, blend and gate in one Triton kernel; GPU only, not yet measured on one
    gate_input: Literal["query", "hidden"] = "query"  # what the gate reads (model/attention.py)
    gate_side: Literal["local", "global"] = "local"  # which of the two attentions the gate multiplies
    # Of the gate's logit, which starts at zero: sigmoid starts with an even blend, tanh with the ungated side alone.
    gate_activation: Literal["sigmoid", "tanh"] = "sigmoid"
    # What normalizes h between loops. rms: a later loop's input divides it by its RMS before scaling it, as an RMSNorm
    # whose weight is the scale; final: the final norm follows every loop instead of the last.
    loop_norm: Literal["none", "rms", "final"] = "none"
    embedding_scale: Finite = 1.0  # B = embedding_scale * E + hidden_scale * shift(h), loops >= 2
    hidden_scale: Finite = 1.0  # 0, learned, with tanh's gate or none: starts as one loop
    learned_hidden_scale: Literal["none", "model", "channel"] = "none"  # learn hidden_scale, starting from its value
    # Factor of what attention and FFN add to the residual stream, for L loops of N layers.
    # loops_sqrt_layers: residual_scale / (L sqrt(N)) (arXiv 2606.18524); layers: residual_scale / N (arXiv 2505.01618).
    residual_scaling: Literal["none", "loops_sqrt_layers", "layers"] = "none"
    residual_scale: Positive = 1.0
    # muP: tune initial weights and rates at this width, transfer them to hidden_size (docs/model.md). null: no muP.
    mup_base_hidden_size: Size | None = None
    moe: MoeConfig | None = None  # null: a dense model
    backend: Literal["auto", "torch", "te"] = "auto"  # te: Transformer Engine; auto: te in bf16 on a GPU with it


@dataclass
class ParallelConfig:
    """Parallel layout over processes. Data parallelism takes the ranks that the other sizes leave."""

    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1  # loops are its virtual stages
    # Layers of the first and last stage; null: as many as the others. Or count embedding and head as a layer each.
    num_layers_in_first_pipeline_stage: Size | None = None
    num_layers_in_last_pipeline_stage: Size | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    context_parallel_size: Ranks = 1  # ranks that split each sequence, for lengths that do not fit on one rank
    # Transformer Engine's exchange of rows between context-parallel ranks, for the global attention and the window's,
    # which has no p2p (a ring of keys and values). The torch backend gathers keys and values.
    cp_comm_type: Literal["p2p", "a2a", "all_gather"] = "p2p"
    window_cp_comm_type: Literal["a2a", "all_gather"] = "a2a"
    expert_model_parallel_size: Ranks = 1  # ranks that share out a layer's experts, among TP x CP x DP
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"  # how tokens reach their experts
    # null: world size / (TP * PP * CP). plt train uses the machine's GPUs; without a GPU, 1 or as many as experts need.
    data_parallel_size: Ranks | None = None
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    # Gather updated weights during the next forward pass, each bucket before the first loop that uses it.
    overlap_param_gather: bool | None = None  # null: with overlap_grad_reduce, where possible
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    recompute_num_layers: PositiveCount = 1  # layers per recomputed unit, for "full"
    # Parts of a layer to recompute with "selective"; mlp: a dense FFN
    recompute_modules: Annotated[
        list[Literal["core_attn", "mlp", "shared_experts"]], NotEmpty("each part to recompute once")
    ] = field(default_factory=lambda: ["core_attn"])
    # Fused operations of Transformer Engine (docs/throughput.md); null: on where possible.
    gradient_accumulation_fusion: bool | None = None  # matmuls add weight gradients directly to the fp32 buffer
    apply_rope_fusion: bool | None = None
    cross_entropy_loss_fusion: bool | None = None
    # Time limit after which a hung rank is named and the job ended: minutes until the first step ends and while
    # checkpoints are read or written, seconds otherwise (at least five times the longest pause so far).
    distributed_timeout_minutes: Minutes = 10.0
    distributed_timeout_seconds_after_init: Seconds = 300.0


@dataclass
class DataSource:
    """A tokenized source of a data mix; `path` is the prefix of its .bin and .idx."""

    path: Annotated[str, NotEmpty("the path prefix of a .bin and .idx pair")]
    weight: Annotated[float, Range(0, 1e12, low_excluded=True)] = 1.0
    name: str | None = None
    max_epochs: Positive | None = None
    fim_rate: Share | None = None  # training sources only; null: data.fim.rate


@dataclass
class DataStage:
    """The mix of the training data up to a number of tokens (docs/schedules.md)."""

    until: TokenCount  # tokens of the run at which the stage ends, with those that rollbacks skip
    sources: Annotated[list[DataSource], NotEmpty("at least one tokenized source")]


@dataclass
class LengthStage:
    """The row length of a run's steps up to a number of tokens (docs/schedules.md)."""

    until: TokenCount  # tokens of the run at which the stage ends
    sequence_length: Size  # a divisor of data.sequence_length


@dataclass
class FimConfig:
    """Fill-in-the-middle (docs/data.md)."""

    rate: Share  # share of training documents to rearrange
    spm_rate: Share = 0.5  # share of those in the order suffix, prefix, middle (SPM)
    # Tokens before prefix, middle and suffix; null: known ones that the tokenizer has.
    tokens: list[str] | None = None


@dataclass
class DataConfig:
    """Data of a run: either `sources`, divided by `split`, or one list of sources per part."""

    ALTERNATIVES: ClassVar = (("sources",), ("train_sources", "validation_sources", "test_sources"))

    sources: list[DataSource] = field(default_factory=list)
    split: str = "95,5,0"  # train, validation, test shares of `sources`
    train_sources: list[DataSource] = field(default_factory=list)
    validation_sources: list[DataSource] = field(default_factory=list)
    test_sources: list[DataSource] = field(default_factory=list)
    # Training mixes that precede sources or train_sources: [{until: 80e9, sources: [...]}].
    stages: list[DataStage] = field(default_factory=list)
    tokenizer: str | None = None  # a sentencepiece .model or a Hugging Face tokenizer.json
    sequence_length: Size = 256
    # Shorter rows to begin with: [{until: 20e9, sequence_length: 1024}] reads each sample as several rows.
    length_schedule: list[LengthStage] = field(default_factory=list)
    # Length of the sample permutation; a run reads a prefix. Set it to the longest branch's, so that all branches read
    # the same samples. null: the run's own number of samples.
    order_samples: Annotated[int, Range(1, 10**15)] | None = None
    reset_at_document_boundaries: bool = False  # packed documents: reset attention, positions, shift and loss
    eod_mask_loss: bool = False  # no loss on the token after an end of document, packed or not
    fim: FimConfig | None = None  # fill-in-the-middle; null: none
    index_cache: str | None = None  # directory for cached sample indices; null: the run's folder


@dataclass(frozen=True)
class RateFactors:
    """Learning-rate factors by kind of parameter (model/parameters.py), throughout the schedule."""

    embedding: NotNegative = 1.0  # also the head, if tied
    head: NotNegative = 1.0
    hidden: NotNegative = 1.0  # matrices of the layers
    gates: NotNegative = 1.0  # also learned scales of a later loop's input
    norms: NotNegative = 1.0  # also biases and learned key shifts


@dataclass(frozen=True)
class DecayFactors(RateFactors):
    """Weight-decay factors by the same kinds. Vectors do not decay, except norms and biases if set."""

    norms: NotNegative = 0.0


@dataclass
class OptimizerConfig:
    """The optimizer (config/rules/optimizer.py) and its learning-rate schedule, in optimizer steps, with train_tokens
    in steps of training.global_batch_size."""

    name: Literal["adam", "muon", "sgd"] = "adam"  # adam: with decoupled weight decay (AdamW)
    lr: Positive = 3e-4
    min_lr: NotNegative = 3e-5
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_iters: Steps = 0
    lr_decay_iters: PositiveSteps | None = None  # null: the whole run
    lr_wsd_decay_iters: PositiveSteps | None = None  # WSD: number of final decay steps; null: a tenth of lr_decay_iters
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "linear"
    weight_decay: NotNegative = 0.1
    lr_mult: RateFactors = field(default_factory=RateFactors)
    wd_mult: DecayFactors = field(default_factory=DecayFactors)
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.95
    adam_eps: Positive = 1e-8
    # muon (docs/optimizers.md) updates hidden matrices; Adam, with its own settings, updates everything else
    muon_momentum: BelowOne = 0.95
    muon_nesterov: bool = True
    muon_num_ns_steps: Annotated[int, Range(1, 20)] = 5  # Newton-Schulz iterations; with quintic up to 5, or 10, 15, 20
    muon_coefficient_type: Literal["quintic", "simple", "polar_express"] = "quintic"  # Newton-Schulz polynomials
    # Scale of the update of a matrix [out, in]. spectral: sqrt(max(out, in)); shape_scaling: sqrt(max(1, out / in));
    # unit_rms_norm: sqrt(out / in).
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    # 0.2 with spectral matches Adam's update size, so that one rate and weight decay suit both.
    muon_extra_scale_factor: Positive = 0.2
    sgd_momentum: BelowOne = 0.9
    clip_grad: NotNegative = 1.0  # 0: no clipping


@dataclass
class LoopStage:
    """A stage with a fixed or drawn number of loops per step (docs/schedules.md)."""

    ALTERNATIVES: ClassVar = (("loop_count",), ("loop_shares",))

    until: Annotated[float, Range(0, 1, low_excluded=True)] = 1.0  # end, as a share of the run
    loop_count: LoopCount | None = None  # loops of every step; null: model.loop_count
    loop_shares: list[Share] = field(default_factory=list)  # shares of steps with 1, 2, ... loops
    # Share of the stage over which its loops replace the stage before's, with a probability that rises from 0 to 1.
    ramp: Share = 0.0


@dataclass
class BatchStage:
    """The batch size of a run's steps up to a number of tokens (docs/schedules.md)."""

    until: TokenCount  # tokens of the run at which the stage ends
    global_batch_size: Size
    # Grow the batch by this much in equal parts of the stage, up to the next stage's size; null: constant.
    increment: Size | None = None


@dataclass
class Fp8Config:
    """Linear layers in FP8 (docs/fp8.md). The window's attention stays in BF16."""

    format: Literal["hybrid", "e4m3"] = "hybrid"  # hybrid: E4M3, gradients in E5M2
    recipe: Literal["auto", "delayed", "tensorwise", "blockwise", "mxfp8"] = "auto"  # auto: the card's best
    attention: bool = False  # also the global attention; Hopper needs recipe delayed and head dimension 128
    # Layers at both ends of the stack whose linear layers stay in BF16, in every loop; not with recipe delayed.
    num_layers_at_start_in_bf16: Count = 0
    num_layers_at_end_in_bf16: Count = 0


@dataclass
class SpikeConfig:
    """Steps whose loss is far above recent ones of the same loops, data stage and row length, and no larger batch."""

    action: Literal["skip", "rollback"]
    threshold: Positive = 6.0  # standard deviations above the mean
    window: Annotated[int, Range(2, 10**6)] = 128  # recent steps; detection begins with a quarter as many of that kind


@dataclass
class TrainingConfig:
    """Training of a run: length, batches, losses, precision. Give either `train_iters` or `train_tokens`."""

    ALTERNATIVES: ClassVar = (("train_iters",), ("train_tokens",))

    micro_batch_size: PositiveCount = 1  # sequences
    global_batch_size: Size = 8  # sequences per optimizer step, once batch_schedule has ended
    train_iters: PositiveSteps | None = None
    train_tokens: TokenCount | None = None
    # Smaller batches to begin with: [{until: 20e9, global_batch_size: 256}]; empty: none.
    batch_schedule: list[BatchStage] = field(default_factory=list)
    # Loops per step: [{until: 0.5, loop_count: 1}]; from the last stage's end on, model.loop_count.
    loop_schedule: list[LoopStage] = field(default_factory=list)
    # Weights of losses on the outputs of loops 1, 2, ...; the last loop's weight is 1. A single number applies to all
    # earlier loops; empty: none.
    loop_loss_weights: list[NotNegative] = field(default_factory=list)
    # Weight of PaLM's z-loss, logsumexp(logits)^2 of the last loop; PaLM: 1e-4. Not part of the reported `loss`.
    z_loss_coeff: NotNegative = 0.0
    # Parameters to train, by parts of their names in a checkpoint, with *, ? and [0-9]: ["layers.2[0-9]", plt_gate].
    # The others keep their values and have neither gradients nor optimizer state. Empty: train all.
    trainable: list[str] = field(default_factory=list)
    seed: Annotated[int, Range(1, 2**31 - 1)] = 1234  # megatron-core refuses 0, numpy more than 32 bits
    precision: Literal["fp32", "bf16"] = "bf16"  # parameters; bf16 keeps an fp32 main copy
    fp8: Fp8Config | None = None  # linear layers of the `te` backend in FP8; null: none
    # EMA decay of the weights (docs/checkpoints.md); null: no average.
    ema_decay: BelowOne | None = None
    deterministic: bool = False
    threads_per_process: PositiveCount | None = None  # CPU only; null: this machine's cores / processes
    # A bad step is reported in <run folder>/incidents. skip: keep the weights; rollback: return to the last checkpoint
    # and continue with the data after the bad step.
    on_nonfinite: Literal["fail", "skip", "rollback"] = "skip"  # loss or gradient norm is infinite or not a number
    spikes: SpikeConfig | None = None  # the loss jumps; null: nothing is done
    # Limit on bad steps in a row and per 1,000 steps; more end the run. A restart with other settings resets the count.
    max_skipped_steps: Count = 10


@dataclass
class ValidationConfig:
    """Loss on held-out text, for the same weights at each of `loop_counts`."""

    interval: Steps = 0  # steps; 0: only after the last
    iters: Count = 8  # global batches; 0: no validation
    loop_counts: list[LoopCount] = field(default_factory=list)  # empty: the model's own
    # Validate `iters` batches of each source instead of the mix; report loss and bits per byte of each and of all.
    by_source: bool = False


@dataclass
class ExportsConfig:
    """Exports of checkpoints to Hugging Face's format, in `<run folder>/exports`."""

    interval: PositiveSteps  # steps: a multiple of save_interval
    # Upload finished exports here while training (docs/checkpoints.md); null: no upload. A bucket or folder
    # (s3://bucket/folder, file:///folder) gets a folder with the run's name, a hub (hf://owner/name) a branch each.
    upload_to: str | None = None


@dataclass
class UploadsConfig:
    """Uploads of checkpoints while training (docs/checkpoints.md)."""

    to: str  # a bucket or folder, which gets a folder with the run's name
    keep_last: PositiveCount = 2  # checkpoints to keep there, besides those of keep_every


@dataclass
class CheckpointConfig:
    """megatron-core distributed checkpoints in `<run folder>/checkpoints`."""

    save_interval: Steps = 0  # steps; 0: only after the last
    keep_last: PositiveCount = 2
    keep_every: Steps = 0  # keep checkpoints at multiples of this many steps permanently; 0: none
    exports: ExportsConfig | None = None  # null: none
    uploads: UploadsConfig | None = None  # of checkpoints; null: none
    async_save: bool = False  # write while training continues; published at a later step
    # Another run's folder or checkpoint to start from, local or where uploads.to put it; null: resume this run's own
    load: str | None = None
    weights_only: bool = False  # with `load`: load the weights only; reset optimizer, schedule, data and step
    allow_other_data: bool = False  # resume with other data, tokenizer or sampling than the checkpoint's
    allow_other_schedule: bool = False  # resume with other optimizer settings than the checkpoint's
    enabled: bool = True  # false: neither save nor resume from own checkpoints; `load` still works


@dataclass
class EvaluationConfig:
    """lm-evaluation-harness tasks for a run's exports (`checkpoint.exports`), on the CPU beside training."""

    tasks: Annotated[list[str], NotEmpty("each task once, or set evaluation=null")]
    include_path: str | None = None  # folder of task files; null: lm-evaluation-harness's own, with cached data
    limit: PositiveCount | None = None  # rows of each task; null: all


@dataclass
class ProfileConfig:
    """torch.profiler's trace of some steps, in `<run folder>/profile`."""

    step_end: PositiveSteps  # the last step
    step_start: Steps = 0  # the step before the first one
    ranks: list[Annotated[int, Range(0, 2**20)]] = field(default_factory=lambda: [0])


@dataclass
class StragglerConfig:
    """Detection of ranks with a slow GPU (docs/slurm.md), by nvidia-resiliency-ext."""

    interval: PositiveSteps  # steps
    threshold: Share = 0.75  # a GPU is slow below this share of the fastest one's speed, or of its own earlier speed


@dataclass
class LoggingConfig:
    """Destinations of metrics. metrics.jsonl is always written."""

    log_interval: PositiveSteps = 10  # steps
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: Positive | None = None  # one device's dense peak for MFU; null: datasheet, or measured on a CPU
    profile: ProfileConfig | None = None
    straggler: StragglerConfig | None = None


@dataclass
class DeepSpeedConfig:
    """DeepSpeed's engine, for few GPUs and much CPU memory (docs/deepspeed.md)."""

    zero_stage: Annotated[int, Range(1, 3)] = 1  # shards optimizer state; 2: gradients too; 3: parameters too
    offload_optimizer: Literal["none", "cpu"] = "none"  # optimizer state and its step
    offload_param: Literal["none", "cpu"] = "none"  # stage 3: parameters
    config: dict[str, Any] = field(default_factory=dict)  # added to DeepSpeed's generated configuration


@dataclass
class RunConfig:
    """The whole configuration; what a YAML file in configs/runs resolves to."""

    REFUSED: ClassVar = REFUSED  # settings of Megatron-LM that do not exist here, and why

    name: str = "run"
    output_dir: str = "runs"  # the run folder is <output_dir>/<name>
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig | None = None  # of exports; null: none
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    deepspeed: DeepSpeedConfig | None = None  # null: megatron-core's engine
