"""The run configuration: every setting of a run, its type, its default and its meaning.

Plain dataclasses and nothing else: this module imports no torch, so that a bad configuration is
answered in milliseconds. Loading is in `loader`, checking in `validation`.
Names are megatron-core's where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelConfig:
    """A Parallel Loop Transformer (arXiv 2510.24824): a decoder whose layers run `loop_count` times.

    `loop_count: 1` is a plain transformer (RMSNorm, SwiGLU, GQA, RoPE), no parameter added.
    """

    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    num_query_groups: int | None = None  # key/value heads; None: as many as attention heads
    kv_channels: int | None = None  # head dimension; None: hidden_size // num_attention_heads
    vocab_size: int | None = None  # None: the tokenizer's
    make_vocab_size_divisible_by: int = 128  # the embedding is padded to a multiple of this times TP
    share_embeddings_and_output_weights: bool = True  # tied embeddings
    rotary_base: float = 10000.0
    rope_scaling_factor: float | None = None  # Llama 3.1's scaling, from 8,192 tokens to this many times as many
    layernorm_epsilon: float = 1e-5
    qkv_bias: bool = False  # biases on the Q, K and V projections (Qwen2)
    qk_layernorm: bool = False  # RMSNorm on each head's Q and K
    ffn_output_norm: bool = False  # RMSNorm on the FFN's output, before the residual is added
    # post: no norms on the inputs of attention and FFN but on their outputs, and qk_layernorm over all heads (OLMo-2)
    norm_placement: Literal["pre", "post"] = "pre"
    init_method_std: float = 0.02
    # The loop (paper section 3; published variants: see docs/model.md).
    loop_count: int = 2
    cross_loop_parallel: bool = True  # loop l reads E + shift(h of loop l-1); False: h itself
    share_kv: bool = True  # loops >= 2 attend to the first loop's K and V
    gated_window: bool = True  # ... and, gated per head, to a window of their own
    window_size: int = 64  # keys a query sees in the local attention, itself included
    fused_gated_window: bool = False  # window, blend and gate in one Triton kernel; GPUs, not measured on one yet
    gate_input: Literal["query", "hidden"] = "query"
    gate_side: Literal["local", "global"] = "local"  # which of the two attentions the gate multiplies
    norm_between_loops: bool = False  # the final norm after every loop instead of after the last
    embedding_scale: float = 1.0  # B = embedding_scale * E + hidden_scale * shift(h), loops >= 2
    hidden_scale: float = 1.0
    # Mixture of experts (docs/moe.md): every layer's FFN becomes num_moe_experts of them, of which a token uses topk.
    num_moe_experts: int | None = None  # None: a dense model
    moe_router_topk: int = 2  # experts a token is sent to
    moe_ffn_hidden_size: int | None = None  # of one expert; None: ffn_hidden_size
    moe_shared_expert_intermediate_size: int | None = None  # of an expert that every token uses beside; None: none
    moe_router_pre_softmax: bool = False  # weights of the chosen: their share of all (true), or of the chosen (false)
    # Over what the load is balanced: each sequence (whatever the layout and the micro-batch size), or each microbatch.
    moe_router_load_balancing_type: Literal["seq_aux_loss", "aux_loss", "none"] = "seq_aux_loss"
    moe_aux_loss_coeff: float = 0.01
    moe_z_loss_coeff: float = 0.0  # keeps the router's logits small
    moe_expert_capacity_factor: float | None = None  # what exceeds this times an even load is dropped; None: nothing
    backend: Literal["auto", "torch", "te"] = "auto"  # te: Transformer Engine; auto: te on a GPU that has it


@dataclass
class ParallelConfig:
    """How the model is laid out over processes. Data parallelism takes what the others leave."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1  # loops are its virtual stages
    context_parallel_size: int = 1  # ranks that share each sequence, for lengths that one does not hold
    # How Transformer Engine's attentions move rows between these ranks; the torch backend has one way of its own.
    cp_comm_type: Literal["p2p", "a2a", "all_gather"] = "p2p"  # the global attention; p2p: keys and values in a ring
    window_cp_comm_type: Literal["p2p", "a2a", "all_gather"] = "a2a"  # the window, which has no p2p
    # Ranks that share out a layer's experts, among those that hold the same layers (TP x CP x DP).
    expert_model_parallel_size: int = 1
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"  # how tokens travel to their experts
    # None: world size / (TP * PP * CP); launch/local.py: 1, or as many as share out the experts
    data_parallel_size: int | None = None
    sequence_parallel: bool = False
    overlap_grad_reduce: bool = False
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    recompute_num_layers: int = 1  # layers per recomputed unit, for "full"
    # How long a rank may hang before the job is ended with its name: minutes until the first step is done and while
    # checkpoints are read or written, seconds after that (a slow machine gets five times its longest pause).
    distributed_timeout_minutes: float = 10.0
    distributed_timeout_seconds_after_init: float = 300.0


@dataclass
class DataSource:
    """One tokenized source of a data mix: the path prefix of its .bin and .idx."""

    path: str = ""
    weight: float = 1.0
    name: str | None = None
    max_epochs: float | None = None


@dataclass
class DataConfig:
    """What is read. Either `sources` cut by `split`, or one list per part."""

    sources: list[DataSource] = field(default_factory=list)
    split: str = "95,5,0"  # train, validation, test shares of `sources`
    train_sources: list[DataSource] = field(default_factory=list)
    validation_sources: list[DataSource] = field(default_factory=list)
    test_sources: list[DataSource] = field(default_factory=list)
    tokenizer: str | None = None  # a sentencepiece .model or a Hugging Face tokenizer.json
    sequence_length: int = 256
    reset_at_document_boundaries: bool = False  # packed documents: attention, positions, shift, loss
    index_cache: str | None = None  # where sample indices lie; None: beside the run
    index_timeout_minutes: float = 30.0


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule, in optimizer steps."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None  # None: train_iters
    lr_wsd_decay_iters: int | None = None  # WSD: the last steps, over which the rate falls; None: a tenth
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "linear"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0  # 0: no clipping


@dataclass
class TrainingConfig:
    """How long and in which batches. Exactly one of `train_iters` and `train_tokens` is given."""

    micro_batch_size: int = 1  # sequences
    global_batch_size: int = 8  # sequences per optimizer step
    train_iters: int | None = None
    train_tokens: int | None = None
    seed: int = 1234
    precision: Literal["fp32", "bf16"] = "bf16"  # parameters; bf16 keeps an fp32 main copy
    # Linear layers of the `te` backend in FP8; hybrid: E4M3, gradients in E5M2. The window's attention stays in BF16.
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    fp8_recipe: Literal["auto", "delayed", "tensorwise", "blockwise", "mxfp8"] = "auto"  # auto: the card's best
    fp8_attention: bool = False  # the global attention too; on Hopper with recipe delayed and head dimension 128
    deterministic: bool = False
    threads_per_process: int | None = None  # CPU only; None: this machine's cores / processes
    # A step that goes wrong is reported in <run folder>/incidents. skip: the weights stay as they were;
    # rollback: back to the last checkpoint, then on with the data that comes after the bad step.
    on_nonfinite: Literal["fail", "skip", "rollback"] = "skip"  # loss or gradient norm is infinite or no number
    on_spike: Literal["ignore", "skip", "rollback"] = "ignore"  # the loss jumps
    spike_threshold: float = 6.0  # standard deviations above the mean loss of the last `spike_window` steps
    spike_window: int = 128  # steps; none counts as a spike before there are a quarter as many
    max_skipped_steps: int = 10  # in a row, and as often altogether per 1,000 steps: more end the run


@dataclass
class ValidationConfig:
    """Loss on held-out text, for the same weights at each of `loop_counts`."""

    interval: int = 0  # steps; 0: only after the last
    iters: int = 8  # global batches; 0: no validation
    loop_counts: list[int] = field(default_factory=list)  # empty: the model's own


@dataclass
class CheckpointConfig:
    """megatron-core distributed checkpoints in `<run folder>/checkpoints`."""

    save_interval: int = 0  # steps; 0: only after the last
    keep_last: int = 2
    keep_every: int = 0  # steps whose multiples are kept for good; 0: none
    async_save: bool = False  # write while training goes on; published at a later step
    load: str | None = None  # another run's folder or checkpoint to start from; None: resume this run's own
    weights_only: bool = False  # of `load`: weights alone; optimizer, schedule, data and step start anew
    allow_other_data: bool = False  # go on although data, tokenizer or sampling are not the checkpoint's
    allow_other_schedule: bool = False  # go on although the optimizer's settings are not the checkpoint's
    enabled: bool = True


@dataclass
class LoggingConfig:
    """Where metrics go. metrics.jsonl is always written."""

    log_interval: int = 10  # steps
    tensorboard: bool = True
    wandb_project: str | None = None
    peak_tflops: float | None = None  # one device's dense peak for MFU; None: datasheet, or measured on a CPU
    profile_step_start: int = 0  # torch.profiler trace of the steps after this one ...
    profile_step_end: int = 0  # ... up to this one, in <run folder>/profile; 0: none
    profile_ranks: list[int] = field(default_factory=lambda: [0])


@dataclass
class ZeroConfig:
    """`engine: deepspeed`: what ZeRO shards over the data-parallel ranks, and what it keeps in CPU memory."""

    stage: int = 1  # 1: optimizer state; 2: gradients too; 3: parameters too, gathered layer by layer
    offload_optimizer: Literal["none", "cpu"] = "none"  # optimizer state and its step
    offload_param: Literal["none", "cpu"] = "none"  # stage 3: parameters


@dataclass
class RunConfig:
    """The whole configuration; what a YAML file in configs/runs resolves to."""

    name: str = "run"
    output_dir: str = "runs"  # the run folder is <output_dir>/<name>
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    engine: Literal["megatron", "deepspeed"] = "megatron"  # deepspeed: few GPUs, much CPU memory (docs/deepspeed.md)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # added to DeepSpeed's configuration, which is ours
