"""Simulated passes of a rank of a pipeline stage, in schedule order, with what each saves and needs (`activations`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from plt_megatron.config import derived
from plt_megatron.predict.activations import Activations
from plt_megatron.predict.held import Stage
from plt_megatron.predict.layers import Run, runs
from plt_megatron.predict.layout import Pass
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
        self.layers, self.looped = len(self.own), len(derived.looped_among(self.model, self.own))
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
            needs["activations"] = self.unit * shapes.layer()
            needs["first-loop K/V"] = self.unit * shapes.first_loop_kv() if loop == 1 else 0
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
