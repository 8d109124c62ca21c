"""Peak memory of one rank of each pipeline stage, by component.

What a rank always holds (weights, gradient buffer, optimizer state) is arithmetic. On top of it, the step's passes are
simulated in schedule order with what each layer saves and needs (`activations`), and the peak is reported. The
optimizer's step is another candidate for the peak.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from plt_megatron.config import derived
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.held import Held, RankMatrix, Stage, share_in_fp8
from plt_megatron.predict.layers import FP32, Run, runs
from plt_megatron.predict.layout import BYTES, Layout, Pass, enough_microbatches, passes
from plt_megatron.predict.parameters import Weights, count_parameters
from plt_megatron.predict.step import Step


@dataclass
class MemorySimulator:
    """Simulates the passes of one stage and remembers the peak and its phase."""

    of: Step
    stage: Stage
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    phase: str = "between steps"

    def __post_init__(self) -> None:
        self.model, self.layout, self.shapes = self.of.config.model, self.of.layout, self.of.shapes
        self.trained, self.own = self.stage.trained, self.stage.layers
        self.loops = self.model.loop_count
        self.layers, self.looped = len(self.own), derived.count_looped(self.model, self.own)
        self.by_layer = self.model.loop_order == "layer"
        self.full = self.layout.recompute == "full"
        self.alone = self.layout.pipeline == 1
        self.first, self.last = self.stage.index == 0, self.stage.index == self.layout.pipeline - 1
        self.with_loss = self.of.losses(self.stage)
        self.unit = max(1, min(self.layout.recompute_num_layers, self.layers))
        self.element = self.shapes.element
        loops = range(1, self.loops + 1)
        self.saved = {loop: self._saved(loop) for loop in loops}
        self.working = {loop: self._working_set(loop, self.own[-1]) if self.own else Counter() for loop in loops}
        self.first_layer = {loop: self._first_layer(loop) for loop in loops}
        self.table = self.element * self.shapes.vocab * self.shapes.hidden * self.shapes.trained.has_head
        self.live["temporaries"] = 0 if self.shapes.documents else self.shapes.window_bias()
        self.highest = 0
        self._mark({}, "between steps")

    def step(self, each: Pass) -> None:
        loops = [each.loop] if each.loop else list(range(1, self.loops + 1))
        if each.backward:
            for loop in reversed(loops):
                self._backward(loop)
            self._weights_done()
        else:
            for loop in loops:
                self._forward(loop)

    # Forward.

    def _forward(self, loop: int) -> None:
        self.live.update(self.saved[loop])
        if loop in self.with_loss:
            self.live["logits"] += self.shapes.softmax()
            which = "the last loop" if loop == self.loops else f"loop {loop}"
            self._mark({"logits": self.shapes.head_forward()}, f"the loss of {which}")

    def _saved(self, loop: int) -> Counter[str]:
        """Return the bytes that one loop's forward pass saves, by component."""
        shapes = self.shapes
        saved: Counter[str] = Counter()
        if self.full:
            saved["activations"] = self._units(loop) * shapes.hidden_bytes()
        else:
            saved["activations"] = shapes.layers_in_loop(self.own, loop)
        if self.first and loop > 1:
            saved["activations"] += shapes.loop_input()
        if self.last:
            saved["activations"] += shapes.loop_end(loop in self.with_loss)
        if not self.alone:  # what was received and what is sent
            saved["activations"] += shapes.hidden_bytes()
        if self.layers == 0 and not (self.first and loop > 1):  # a stage without layers sends a copy
            saved["activations"] += shapes.hidden_bytes()
        if loop == 1:
            saved["first-loop K/V"] = self.looped * shapes.first_loop_kv()
        return saved

    def _units(self, loop: int) -> int:
        """Count the groups of layers that save only their input."""
        looped, ran = derived.looped_layers(self.model), runs(self.model, self.own, loop)
        prelude, coda = sum(run.layer < looped.start for run in ran), sum(run.layer >= looped.stop for run in ran)
        unit = 1 if self.by_layer else self.unit
        return -(-self.looped // unit) + sum(-(-layers // self.unit) for layers in (prelude, coda))

    # Backward.

    def _backward(self, loop: int) -> None:
        if loop in self.with_loss:
            self._head_backward(loop)
        self._mark(self.working[loop], f"backward of loop {loop}, last layer")
        if loop == self.loops > 1:  # what waits for earlier loops
            waiting = 1 if self.by_layer else self.looped
            self.live["K/V gradients"] += waiting * self.shapes.kv_gradients()
            if self._autograd_keeps_weight_gradients:
                kept = (self.trained.layers + self.trained.experts) * waiting // self.layers
                self.live["weight gradients in autograd"] += self.element * kept
        self.live.subtract(self.saved[loop])
        self._mark(self.first_layer[loop], f"backward of loop {loop}, first layer")
        if loop == 1 < self.loops:
            self.live["K/V gradients"] -= (1 if self.by_layer else self.looped) * self.shapes.kv_gradients()

    def _head_backward(self, loop: int) -> None:
        self._mark({"logits": self.shapes.head_backward()}, "the gradient of the logits")
        self.live["logits"] -= self.shapes.softmax()
        if self.alone and self.model.share_embeddings_and_output_weights and loop == self.loops:
            self.live["weight gradients in autograd"] += self.table  # until the embedding's own arrives
        else:
            self._mark({"temporaries": self.table}, "the gradient of the output layer")

    def _working_set(self, loop: int, layer: int) -> Counter[str]:
        """Return what a layer's backward pass needs beyond `live`, which has all that is saved; assumes it loops."""
        shapes = self._as_looped(layer, loop)
        needs = Counter({"temporaries": shapes.backward_working_set()})
        largest = shapes.hidden * 2 * shapes.ffn * self.element
        if self.full:
            unit = 1 if self.by_layer and layer in derived.looped_layers(self.model) else self.unit
            needs["activations"] = unit * shapes.layer()
            needs["first-loop K/V"] = unit * shapes.first_loop_kv() if loop == 1 else 0
        if not self._autograd_keeps_weight_gradients:
            if not shapes.fusions.gradient_accumulation_fusion:
                needs["temporaries"] += largest
            elif self.layout.overlap_grad_reduce:  # a dummy gradient per weight shape
                needs["temporaries"] += self.trained.layers // self.layers * self.element
        if shapes.documents:
            needs["temporaries"] += 2 * shapes.window_bias()
        return needs

    def _as_looped(self, layer: int, loop: int) -> Activations:
        """Return the sizes of a layer's run in a loop, as if it ran in all."""
        return self.shapes.of_run(Run(layer, "once" if self.loops == 1 else "first" if loop == 1 else "later"))

    @property
    def _autograd_keeps_weight_gradients(self) -> bool:
        """Whether autograd itself accumulates a weight's gradients until the first loop's arrive, as it does with all
        loops in one graph. Pipelines run the backward of one loop at a time, and full recomputation of one unit. Fused
        accumulation leaves autograd no gradients, except dummies if the reduction overlaps."""
        fused = self.shapes.fusions.gradient_accumulation_fusion and not self.layout.overlap_grad_reduce
        return self.alone and self.loops > 1 and not self.full and not fused

    def _first_layer(self, loop: int) -> Counter[str]:
        """Return the working set at the first layer, the only one whose saved tensors of this loop are still alive."""
        if not self.own:
            return Counter()
        needs = self._working_set(loop, self.own[0])
        if not self.full:
            needs["activations"] += self._as_looped(self.own[0], loop).layer()
            needs["first-loop K/V"] += self.shapes.first_loop_kv() if loop == 1 else 0
        return needs

    def _weights_done(self) -> None:
        if self.first:
            self._mark({"temporaries": self.element * self.trained.embedding}, "the gradient of the embedding")
        self.live["weight gradients in autograd"] = 0

    def _mark(self, beside: Mapping[str, int], phase: str) -> None:
        held = sum(self.live.values()) + sum(beside.values())
        if held > self.highest:
            self.highest, self.phase = held, phase
            self.peak = self.live + Counter(beside)


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
    return [_stage_memory(step, stage) for stage in step.stages]


def _stage_memory(step: Step, stage: Stage) -> MemoryEstimate:
    config, layout = step.config, step.layout
    held = Counter(persistent_bytes(stage.dense, config, layout))
    if stage.experts.size:
        held += Counter(persistent_bytes(stage.experts, config, layout))
    held["inputs"] = _inputs(config, layout)
    if config.training.fp8 is not None:
        held["FP8 weights"] = int(FP8_COPIES * _parameters_in_fp8(config, stage))
    player = MemorySimulator(step, stage)
    count = enough_microbatches(layout.pipeline, layout.microbatches)
    for each in passes(layout.pipeline, stage.index, config.model.loop_count, count):
        player.step(each)
    candidates = [(player.peak, player.phase), (_optimizer_step(config, layout, stage), "the optimizer's step")]
    at_peak, phase = max(candidates, key=lambda candidate: candidate[0].total())
    held += at_peak
    return MemoryEstimate(stage.index, {name: int(held[name]) for name in COMPONENTS}, phase)


def _parameters_in_fp8(config: RunConfig, stage: Stage) -> float:
    """Return how many of a rank's parameters belong to linear layers in FP8, its experts included."""
    experts = [layer for layer in stage.layers if layer in derived.expert_layers(config.model)]
    counted = stage.parameters
    return counted.layers * share_in_fp8(config, stage.layers) + counted.experts * share_in_fp8(config, experts)


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
    muon = max(_matrix_update(config, held) for held in stage.held)
    adam = 0
    if layout.on_cpu and layout.backend != "te":
        largest = max(stage.trained.embedding, stage.trained.output_layer)
        adam = 2 * FP32 * largest // (layout.shards if layout.zero_stage >= 1 else 1)
    elif layout.backend != "te":
        dense = stage.dense.part if layout.zero_stage >= 1 else stage.dense.divided
        adam = FP32 * (dense + stage.experts.part)
    return Counter({"temporaries": max(muon, adam)})


def _matrix_update(config: RunConfig, held: Held) -> int:
    """Return the most bytes that the update of one matrix needs: its direction, beside that of the matrix before it."""
    highest = 0
    for rank in set(held.matrices):
        for matrix in set(rank):
            sizes = [each.size for each in rank]
            sizes.remove(matrix.size)
            highest = max(highest, FP32 * max(sizes, default=0) + _orthogonalization(config, matrix))
    return highest


def _orthogonalization(config: RunConfig, matrix: RankMatrix) -> int:
    """Return the bytes that megatron-core's Muon needs beside momentum and gradient: the direction, copies of its parts
    and their results in fp32, and for one part at a time what is gathered, twice, with the Newton-Schulz iteration's X
    before and after, X X^T and its polynomial, in bf16 unless the model is in fp32; or the result and its scaling."""
    element = BYTES[config.training.precision]
    highest, done = 0, 0
    for rows, columns in matrix.wholes:
        whole, square = rows * columns, min(rows, columns) ** 2
        own = whole * matrix.size // sum(map(math.prod, matrix.wholes))  # this rank's part
        iteration = max(element * (2 * whole + 2 * square), (element + FP32) * whole if element != FP32 else 0)
        gathered = 2 * FP32 * whole if matrix.split else 0
        highest = max(highest, FP32 * done + max(gathered + iteration, FP32 * (whole + 2 * own)))
        done += own
    kept = bool(config.optimizer.muon_nesterov) + matrix.interleaved
    return highest + FP32 * kept * matrix.size


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
    return max(_written(step.config, step.layout, stage) for stage in step.stages)


def _written(config: RunConfig, layout: Layout, stage: Stage) -> int:
    """Return the bytes that a stage's busiest rank writes. Those that share the writing of an expert are one
    data-parallel group."""
    element, dense, table = BYTES[config.training.precision], stage.dense, stage.parameters.output_layer
    if stage.index > 0 and config.model.share_embeddings_and_output_weights:  # a copy, which the first stage writes
        frozen = dense.frozen if stage.trained.output_layer else dense.frozen - table
        dense, table = replace(dense, size=dense.size - table, frozen=frozen), 0
    precise, of_matrices = (_precise_bytes(config, hidden_matrix=which) for which in (False, True))
    matrices = [of_matrices * sum(matrix.size for matrix in rank) for rank in dense.matrices]
    largest, even = element * max(stage.parameters.embedding, table), sum(matrices) + element * dense.size
    unequal = max(*matrices, min(matrices) + largest, even // dense.shards)  # ranks with little state write weights
    state = precise * sum(held.divided // held.shards for held in (dense, stage.experts))
    sharing = layout.ranks_per_stage // math.lcm(layout.tensor, layout.expert)
    return unequal + state + of_matrices * stage.experts.most + element * stage.experts.size // sharing
