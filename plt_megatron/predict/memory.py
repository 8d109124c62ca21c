"""Peak memory of one rank of each pipeline stage, by component.

What a rank always holds (weights, gradient buffer, optimizer state) is arithmetic. On top of it the step's passes are
simulated in the order of the schedule, with what each layer saves and needs (`activations`), and the peak is reported.
The optimizer's step is another candidate for the peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from plt_megatron.config import derived
from plt_megatron.config.optimizers import optimizer_spec
from plt_megatron.config.schema import RunConfig
from plt_megatron.predict.activations import FP32, Activations, activations
from plt_megatron.predict.layout import BYTES, Layout
from plt_megatron.predict.matrices import NONE, StageMatrices, matrix_parameters, stage_matrices
from plt_megatron.predict.parameters import RankParameters, count_parameters, count_rank_parameters
from plt_megatron.predict.schedule import Pass, enough_microbatches, passes

FP8_COPIES = 2  # Transformer Engine keeps each quantized weight and its transpose, a byte each, through the step


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of the worst rank of a pipeline stage at its peak.

    Attributes:
        stage: from 0.
        components: bytes at the peak by what holds them; components not alive then are 0.
        phase: when the peak is.
    """

    stage: int
    components: dict[str, int]
    phase: str

    @property
    def total_bytes(self) -> int:
        return sum(self.components.values())


# In the order in which they are shown.
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


def estimate_memory(config: RunConfig, layout: Layout, vocab_size: int) -> list[MemoryEstimate]:
    """One estimate per pipeline stage."""
    shapes = activations(config, layout, vocab_size)
    return [_stage_memory(config, layout, vocab_size, shapes, stage) for stage in range(layout.pipeline)]


def _stage_memory(
    config: RunConfig, layout: Layout, vocab_size: int, shapes: Activations, stage: int
) -> MemoryEstimate:
    parameters = count_rank_parameters(config.model, vocab_size, layout, stage)
    matrices, of_experts = (stage_matrices(config, layout, stage, experts=which) for which in (False, True))
    held = Counter(persistent_bytes(parameters.dense, config, layout, matrices=matrices))
    if parameters.experts:
        held += Counter(persistent_bytes(parameters.experts, config, layout, layout.expert_shards, of_experts))
    held["inputs"] = _inputs(config, layout)
    if config.training.fp8 is not None:
        held["FP8 weights"] = int(FP8_COPIES * parameters.layers * _layers_in_fp8(config, layout, stage))
    player = MemorySimulator(config, layout, shapes, parameters, stage)
    count = enough_microbatches(layout.pipeline, layout.microbatches)
    for each in passes(layout.pipeline, stage, config.model.loop_count, count):
        player.step(each)
    candidates = [(player.peak, player.phase)]
    candidates.append((_optimizer_step(config, parameters, layout, matrices, of_experts), "the optimizer's step"))
    step, phase = max(candidates, key=lambda candidate: candidate[0].total())
    held += step
    return MemoryEstimate(stage, {name: int(held[name]) for name in COMPONENTS}, phase)


def _layers_in_fp8(config: RunConfig, layout: Layout, stage: int) -> float:
    """The share of a stage's layers whose linear layers are in FP8."""
    fp8, layers = config.training.fp8, config.model.num_layers
    own = layout.stage_layers(layers)[stage]
    assert fp8 is not None, "the caller asks"
    if fp8.num_layers_at_start_in_bf16 == fp8.num_layers_at_end_in_bf16 == 0:
        return 1.0
    if not own:
        return 0.0
    in_fp8 = range(fp8.num_layers_at_start_in_bf16, layers - fp8.num_layers_at_end_in_bf16)
    return sum(layer in in_fp8 for layer in own) / len(own)


def persistent_bytes(
    parameters: int, config: RunConfig, layout: Layout, shards: int | None = None, matrices: StageMatrices = NONE
) -> dict[str, int]:
    """What a rank with so many parameters holds throughout a step, by component.

    `shards`: ranks that hold the same ones; None: `layout.shards`.
    `matrices`: those of the parameters that are each on one of these ranks.

    DeepSpeed keeps fp32 main weights in fp32 too. From stage 2 on, offloading the optimizer takes the gradients along.
    Stage 3 keeps weights that are used again soon whole, up to a limit: each loop uses them again.
    """
    element, shards, zero = BYTES[config.training.precision], shards or layout.shards, layout.zero_stage
    spec = optimizer_spec(config.optimizer)
    parameters -= matrices.size
    part = parameters // shards
    optimizer = part if zero >= 1 else parameters
    gradients = part if zero >= 2 else parameters
    if layout.offload_optimizer:
        optimizer, gradients = 0, 0 if zero >= 2 else gradients
    weights = part if zero >= 3 else parameters
    gathered = min(parameters, layout.max_live_parameters) if zero >= 3 and shards > 1 else 0
    padded, most = shards * matrices.padded, matrices.most
    state = sum(spec.state.values()) * optimizer + sum(spec.state_of(hidden_matrix=True).values()) * most
    return {
        "weights": 0 if layout.offload_weights else element * (weights + padded),
        "gathered weights": element * gathered,
        "main weights": FP32 * (optimizer + most) if element != FP32 or layout.deepspeed else 0,
        "gradients": FP32 * (gradients + padded),
        "optimizer state": state,
        "weight average": _average_bytes(config) * optimizer,
        "DeepSpeed's buckets": FP32 * layout.reduce_bucket,
    }


def _average_bytes(config: RunConfig) -> int:
    """Bytes that the moving average takes per parameter."""
    return 0 if config.training.ema_decay is None else FP32


def _inputs(config: RunConfig, layout: Layout) -> int:
    """Tokens, labels and loss mask of a step's microbatches; with packed documents positions and starts too."""
    per_token = 8 + 8 + FP32 + (9 if config.data.reset_at_document_boundaries else 0)
    tokens = layout.micro_batch_size * config.data.sequence_length // layout.context
    return layout.microbatches * tokens * per_token


def _optimizer_step(
    config: RunConfig, parameters: RankParameters, layout: Layout, matrices: StageMatrices, of_experts: StageMatrices
) -> Counter[str]:
    """Temporaries of the update. torch's Adam goes through one parameter at a time on a CPU and through all of them at
    once on a GPU; Transformer Engine's fused one needs none. Muon comes after it."""
    muon = max(_iteration(config, layout, each) for each in (matrices, of_experts))
    if layout.backend == "te":
        return Counter({"temporaries": muon})
    shards = layout.shards if layout.zero_stage >= 1 else 1
    if layout.on_cpu:
        largest = max(parameters.embedding, parameters.output_layer)
        return Counter({"temporaries": max(muon, 2 * FP32 * largest // shards)})
    dense, experts = parameters.dense - matrices.size, parameters.experts - of_experts.size
    return Counter({"temporaries": max(muon, FP32 * (dense // shards + experts // layout.expert_shards))})


def _iteration(config: RunConfig, layout: Layout, matrices: StageMatrices) -> int:
    """Bytes of Newton-Schulz's largest iteration: the direction, its gathered whole in fp32, and X before and after,
    X X^T and its polynomial in the model's precision."""
    element = BYTES[config.training.precision]
    highest = 0
    for matrix in {matrix for rank in matrices.ranks for matrix in rank}:
        rows, columns = max(matrix.wholes, key=lambda shape: shape[0] * shape[1])
        whole = FP32 * rows * columns if matrix.split else 0
        products = element * (2 * rows * columns + 2 * min(rows, columns) ** 2)
        highest = max(highest, FP32 * matrix.size + whole + products)
    return highest


@dataclass
class MemorySimulator:
    """Simulates the passes of one stage and keeps the phase with the peak."""

    config: RunConfig
    layout: Layout
    shapes: Activations
    parameters: RankParameters
    stage: int
    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    phase: str = "between steps"

    def __post_init__(self) -> None:
        self.loops = self.config.model.loop_count
        model = self.config.model
        self.own = own = self.layout.stage_layers(model.num_layers)[self.stage]
        looped = derived.looped_layers(model)
        self.layers, self.looped = len(own), len(derived.looped_among(model, own))
        # Layers that run once: before the first loop, and after the last.
        self.prelude = sum(layer < looped.start for layer in own)
        self.coda = sum(layer >= looped.stop for layer in own)
        self.by_layer = model.loop_order == "layer"
        self.full = self.layout.recompute == "full"
        self.alone = self.layout.pipeline == 1
        self.first, self.last = self.stage == 0, self.stage == self.layout.pipeline - 1
        self.with_loss = derived.loops_with_loss(self.config, self.loops) if self.last else []
        self.unit = max(1, min(self.layout.recompute_num_layers, self.layers))
        self.element = self.shapes.element
        loops = range(1, self.loops + 1)
        self.saved = {loop: self._saved(loop) for loop in loops}
        self.working = {loop: self._working_set(loop, own[-1]) if own else Counter() for loop in loops}
        self.first_layer = {loop: self._first_layer(loop) for loop in loops}
        self.table = self.element * self.shapes.vocab * self.shapes.hidden
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
        """Add what one loop's forward pass saves."""
        shapes = self.shapes
        saved: Counter[str] = Counter()
        once = (self.prelude if loop == 1 else 0, self.coda if loop == self.loops else 0)
        if self.full:
            unit = 1 if self.by_layer else self.unit
            units = -(-self.looped // unit) + sum(-(-layers // self.unit) for layers in once)
            saved["activations"] = units * shapes.layer_input()
        else:
            kinds = shapes.by_kind(self.config.model, self._running(loop))
            saved["activations"] = sum(count * kind.layer(loop) for kind, count in kinds)
        if self.first and loop > 1:
            saved["activations"] += shapes.loop_input()
        if self.last:
            saved["activations"] += shapes.loop_end(loop in self.with_loss)
        if not self.alone:  # what was received and what is sent
            saved["activations"] += shapes.layer_input()
        if self.layers == 0 and not (self.first and loop > 1):  # what it passes on, a copy
            saved["activations"] += shapes.layer_input()
        if loop == 1:
            saved["first-loop K/V"] = self.looped * shapes.first_loop_kv()
        return saved

    def _running(self, loop: int) -> list[int]:
        """This stage's layers that run in a loop."""
        looped = derived.looped_layers(self.config.model)
        before, after = loop == 1, loop == self.loops
        return [
            layer
            for layer in self.own
            if layer in looped or (before and layer < looped.start) or (after and layer >= looped.stop)
        ]

    # Backward.

    def _backward(self, loop: int) -> None:
        if loop in self.with_loss:
            self._head_backward(loop)
        self._mark(self.working[loop], f"backward of loop {loop}, last layer")
        if loop == self.loops > 1:  # what waits for earlier loops
            waiting = 1 if self.by_layer else self.looped
            self.live["K/V gradients"] += waiting * self.shapes.kv_gradients()
            if self._autograd_keeps_weight_gradients:
                kept = (self.parameters.layers + self.parameters.experts) * waiting // self.layers
                self.live["weight gradients in autograd"] += self.element * kept
        self.live.subtract(self.saved[loop])
        self._mark(self.first_layer[loop], f"backward of loop {loop}, first layer")
        if loop == 1 < self.loops:
            self.live["K/V gradients"] -= (1 if self.by_layer else self.looped) * self.shapes.kv_gradients()

    def _head_backward(self, loop: int) -> None:
        self._mark({"logits": self.shapes.head_backward()}, "the gradient of the logits")
        self.live["logits"] -= self.shapes.softmax()
        if self.alone and self.config.model.share_embeddings_and_output_weights and loop == self.loops:
            self.live["weight gradients in autograd"] += self.table  # until the embedding's own arrives
        else:
            self._mark({"temporaries": self.table}, "the gradient of the output layer")

    def _working_set(self, loop: int, layer: int) -> Counter[str]:
        """What a layer's backward pass needs besides `live`, which has everything saved."""
        shapes = self._looping(layer)
        needs = Counter({"temporaries": shapes.backward_working_set(loop)})
        largest = shapes.hidden * 2 * shapes.ffn * self.element
        if self.full:
            needs["activations"] = self.unit * shapes.layer(loop)
            needs["first-loop K/V"] = self.unit * shapes.first_loop_kv() if loop == 1 else 0
        if not self._autograd_keeps_weight_gradients:
            if not shapes.fusions.gradient_accumulation_fusion:
                needs["temporaries"] += largest
            elif self.layout.overlap_grad_reduce:  # a dummy gradient for each shape of weight
                needs["temporaries"] += self.parameters.layers // self.layers * self.element
        if shapes.documents:
            needs["temporaries"] += 2 * shapes.window_bias()
        return needs

    def _looping(self, layer: int) -> Activations:
        """A layer's shapes, taken to loop."""
        whole = replace(self.config.model, loop_span=None)
        return self.shapes.of_layer(whole, layer)

    @property
    def _autograd_keeps_weight_gradients(self) -> bool:
        """With loops in one graph, autograd accumulates a weight's gradients until its first loop's arrive. Pipelines
        run one loop's backward at a time, and full recomputation one unit's. Fused accumulation has none for it, but
        dummies where the reduction overlaps."""
        fused = self.shapes.fusions.gradient_accumulation_fusion and not self.layout.overlap_grad_reduce
        return self.alone and self.loops > 1 and not self.full and not fused

    def _first_layer(self, loop: int) -> Counter[str]:
        """The same at the first layer, which alone is left of what the loop has saved."""
        if not self.own:
            return Counter()
        needs = self._working_set(loop, self.own[0])
        if not self.full:
            needs["activations"] += self._looping(self.own[0]).layer(loop)
            needs["first-loop K/V"] += self.shapes.first_loop_kv() if loop == 1 else 0
        return needs

    def _weights_done(self) -> None:
        if self.first:
            self._mark({"temporaries": self.element * self.parameters.embedding}, "the gradient of the embedding")
        self.live["weight gradients in autograd"] = 0

    def _mark(self, beside: Mapping[str, int], phase: str) -> None:
        held = sum(self.live.values()) + sum(beside.values())
        if held > self.highest:
            self.highest, self.phase = held, phase
            self.peak = self.live + Counter(beside)


def checkpoint_bytes(config: RunConfig, vocab_size: int, tensor: int = 1) -> int:
    """One checkpoint on disk: weights in their precision; main weights, the optimizer's state and averages in fp32."""
    total = count_parameters(config.model, vocab_size, tensor).total
    spec, matrices = optimizer_spec(config.optimizer), matrix_parameters(config.model)
    state = len(spec.state) * (total - matrices) + len(spec.state_of(hidden_matrix=True)) * matrices
    return total * (BYTES[config.training.precision] + FP32 + _average_bytes(config)) + FP32 * state


def saving_bytes(config: RunConfig, layout: Layout, vocab_size: int) -> int:
    """Host memory that the worst rank needs beside training's while a checkpoint is written: the part that it writes.

    Data-parallel ranks share the writing, and nothing is gathered: a GPU needs no memory for it. Of the weights, each
    writes whole tensors: one of them an embedding, which with many ranks is far more than its share.
    """
    element, spec = BYTES[config.training.precision], optimizer_spec(config.optimizer)
    precise = FP32 * (1 + len(spec.state)) + _average_bytes(config)
    of_matrices = FP32 * (1 + len(spec.state_of(hidden_matrix=True)))

    def written(stage: int) -> int:
        rank = count_rank_parameters(config.model, vocab_size, layout, stage)
        if stage > 0 and config.model.share_embeddings_and_output_weights:
            rank = replace(rank, output_layer=0)  # a copy, which the first stage writes
        dense, experts = (stage_matrices(config, layout, stage, experts=which) for which in (False, True))
        weights = max(element * rank.dense // layout.shards, element * max(rank.embedding, rank.output_layer))
        state = precise * (rank.dense - dense.size) // layout.shards
        state += precise * (rank.experts - experts.size) // layout.expert_shards
        state += of_matrices * (dense.most + experts.most)
        return weights + element * rank.experts // layout.expert_shards + state

    return max(map(written, range(layout.pipeline)))
