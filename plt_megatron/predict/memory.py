"""Peak memory of one rank of each pipeline stage, by component.

What a rank always holds (weights, gradient buffer, optimizer state) is arithmetic. On top of it, the step's passes are
simulated in schedule order with what each layer saves and needs (`activations`), and the peak is reported. The
optimizer's step is another candidate for the peak.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from plt_megatron.config import derived
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.held import Held, Stage
from plt_megatron.predict.layers import FP32
from plt_megatron.predict.layout import BYTES, Layout, enough_microbatches, passes
from plt_megatron.predict.parameters import Weights, count_parameters
from plt_megatron.predict.simulation import MemorySimulator
from plt_megatron.predict.step import Step

FP8_COPIES = 2  # Transformer Engine keeps each quantized weight and its transpose through the step, a byte per element


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of the worst rank of a pipeline stage at its peak.

    Attributes:
        stage: the pipeline stage, from 0.
        components: bytes at the peak by what holds them; 0 if not alive at that time.
        phase: when the peak occurs.
    """

    stage: int
    components: dict[str, int]
    phase: str

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())


# In display order.
COMPONENTS = (
    "weights",
    "gathered weights",
    "FP8 weights",
    "main weights",
    "gradients",
    "optimizer state",
    "weight average",
    "DeepSpeed's buckets",
    "activations",
    "first-loop K/V",
    "K/V gradients",
    "logits",
    "weight gradients in autograd",
    "temporaries",
    "inputs",
)


def estimate_memory(step: Step) -> list[MemoryEstimate]:
    """Return one estimate per pipeline stage."""
    return [_stage_memory(step, stage) for stage in step.stages]


def _stage_memory(step: Step, stage: Stage) -> MemoryEstimate:
    config, layout = step.config, step.layout
    held = Counter(persistent_bytes(stage.dense, config, layout))
    if stage.experts.size:
        held += Counter(persistent_bytes(stage.experts, config, layout))
    held["inputs"] = _inputs(config, layout)
    if config.training.fp8 is not None:
        held["FP8 weights"] = int(FP8_COPIES * stage.parameters.layers * _layers_in_fp8(config, stage.layers))
    player = MemorySimulator(step, stage)
    count = enough_microbatches(layout.pipeline, layout.microbatches)
    for each in passes(layout.pipeline, stage.index, config.model.loop_count, count):
        player.step(each)
    candidates = [(player.peak, player.phase), (_optimizer_step(config, layout, stage), "the optimizer's step")]
    at_peak, phase = max(candidates, key=lambda candidate: candidate[0].total())
    held += at_peak
    return MemoryEstimate(stage.index, {name: int(held[name]) for name in COMPONENTS}, phase)


def _layers_in_fp8(config: RunConfig, layers: range) -> float:
    """Return the share of a stage's layers whose linear layers run in FP8."""
    fp8, last = config.training.fp8, config.model.num_layers
    assert fp8 is not None, "the caller asks"
    if fp8.num_layers_at_start_in_bf16 == fp8.num_layers_at_end_in_bf16 == 0:
        return 1.0
    if not layers:
        return 0.0
    in_fp8 = range(fp8.num_layers_at_start_in_bf16, last - fp8.num_layers_at_end_in_bf16)
    return sum(layer in in_fp8 for layer in layers) / len(layers)


def persistent_bytes(held: Held, config: RunConfig, layout: Layout) -> dict[str, int]:
    """Return the bytes that a rank keeps for these parameters throughout a step, by component.

    DeepSpeed keeps separate fp32 main weights even in fp32. From stage 2 on, offloading the optimizer also offloads
    gradients. Stage 3 keeps weights that are reused soon whole, up to a limit: each loop reuses them.
    """
    element, zero, whole, part = BYTES[config.training.precision], layout.zero_stage, held.divided, held.part
    spec = optimizer_spec(config.optimizer)
    optimizer = part if zero >= 1 else whole
    gradients = part if zero >= 2 else whole
    if layout.offload_optimizer:
        optimizer, gradients = 0, 0 if zero >= 2 else gradients
    weights = part if zero >= 3 else whole
    gathered = min(whole, layout.max_live_parameters) if zero >= 3 and held.shards > 1 else 0
    padded, most = held.shards * held.padded, held.most
    state = sum(spec.state.values()) * optimizer + sum(spec.state_of(hidden_matrix=True).values()) * most
    return {
        "weights": 0 if layout.offload_weights else element * (weights + padded + held.frozen),
        "gathered weights": element * gathered,
        "main weights": FP32 * (optimizer + most) if element != FP32 or layout.deepspeed else 0,
        "gradients": FP32 * (gradients + padded),
        "optimizer state": state,
        "weight average": _average_bytes(config) * optimizer,
        "DeepSpeed's buckets": FP32 * layout.reduce_bucket,
    }


def _average_bytes(config: RunConfig) -> int:
    """Return the bytes per parameter of the moving average."""
    return 0 if config.training.ema_decay is None else FP32


def _precise_bytes(config: RunConfig, *, hidden_matrix: bool = False) -> int:
    """Return the bytes on disk per parameter of fp32 state: main weight, optimizer state, moving average."""
    state = optimizer_spec(config.optimizer).state_of(hidden_matrix=hidden_matrix)
    return FP32 * (1 + len(state)) + _average_bytes(config)


def _inputs(config: RunConfig, layout: Layout) -> int:
    """Return the bytes of tokens, labels and loss mask of a step's microbatches, and of positions and document starts
    if documents are packed."""
    per_token = 8 + 8 + FP32 + (9 if config.data.reset_at_document_boundaries else 0)
    tokens = layout.micro_batch_size * config.data.sequence_length // layout.context
    return layout.microbatches * tokens * per_token


def _optimizer_step(config: RunConfig, layout: Layout, stage: Stage) -> Counter[str]:
    """Return the temporaries of the update. torch's Adam updates one parameter at a time on a CPU and all at once on a
    GPU; Transformer Engine's fused Adam needs none. Muon runs after Adam, so only the larger of the two counts."""
    muon = max(_iteration(config, held) for held in stage.held)
    adam = 0
    if layout.on_cpu and layout.backend != "te":
        largest = max(stage.trained.embedding, stage.trained.output_layer)
        adam = 2 * FP32 * largest // (layout.shards if layout.zero_stage >= 1 else 1)
    elif layout.backend != "te":
        dense = stage.dense.part if layout.zero_stage >= 1 else stage.dense.divided
        adam = FP32 * (dense + stage.experts.part)
    return Counter({"temporaries": max(muon, adam)})


def _iteration(config: RunConfig, held: Held) -> int:
    """Return the bytes of the largest Newton-Schulz iteration: the update direction and its gathered whole in fp32; X
    before and after, X X^T and its polynomial in the training precision."""
    element = BYTES[config.training.precision]
    highest = 0
    for matrix in {matrix for rank in held.matrices for matrix in rank}:
        rows, columns = max(matrix.wholes, key=lambda shape: shape[0] * shape[1])
        whole = FP32 * rows * columns if matrix.split else 0
        products = element * (2 * rows * columns + 2 * min(rows, columns) ** 2)
        highest = max(highest, FP32 * matrix.size + whole + products)
    return highest


def checkpoint_bytes(config: RunConfig, vocab_size: int, tensor: int = 1) -> int:
    """Return the size of one checkpoint on disk: weights in training precision, and fp32 state of the trained ones."""
    padded = derived.padded_vocab_size(config.model, vocab_size, tensor)
    total = count_parameters(config.model, vocab_size, tensor).total
    trained = Weights.trained(config, padded).elements()
    precise = sum(number * _precise_bytes(config, hidden_matrix=each.is_hidden_matrix) for each, number in trained)
    return total * BYTES[config.training.precision] + precise


def saving_bytes(step: Step) -> int:
    """Return the extra host memory that the worst rank needs while a checkpoint is written: the part that it writes.

    Data-parallel ranks share the writing and gather nothing, so the GPU needs no extra memory. Weights are written as
    whole tensors: with many ranks, the one that writes an embedding writes far more than an even share.
    """
    return max(_written(step.config, stage) for stage in step.stages)


def _written(config: RunConfig, stage: Stage) -> int:
    """Return the bytes that a stage's busiest rank writes."""
    element, dense, table = BYTES[config.training.precision], stage.dense, stage.parameters.output_layer
    if stage.index > 0 and config.model.share_embeddings_and_output_weights:  # a copy, which the first stage writes
        frozen = dense.frozen if stage.trained.output_layer else dense.frozen - table
        dense, table = replace(dense, size=dense.size - table, frozen=frozen), 0
    weights = max(element * dense.size // dense.shards, element * max(stage.parameters.embedding, table))
    precise, of_matrices = (_precise_bytes(config, hidden_matrix=which) for which in (False, True))
    state = sum(precise * held.divided // held.shards + of_matrices * held.most for held in (dense, stage.experts))
    return weights + element * stage.experts.size // stage.experts.shards + state
