"""Jobs that the tests of this group run in Transformer Engine's pool, and the cases they train."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed.cases import Case, Layout, Outcome

# Every size a multiple of 16 on two tensor-parallel ranks; mxfp8 asks for 32.
FP8_MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_hidden_size": 64,
    "num_attention_heads": 2,
    "num_query_groups": 2,
    "kv_channels": 32,
    "backend": "te",
}
WEIGHTS_PER_LAYER = 4  # QKV, projection, and the two of the MLP


# In Triton's interpreter it takes most of a test's time: test_te_fusions.py has it.
UNFUSED = {"cross_entropy_loss_fusion": False}


def on_te(case: Case) -> Case:
    """The case on Transformer Engine's layers."""
    return replace(case, model={**case.model, "backend": "te"}, parallel={**UNFUSED, **case.parallel})


def fp8_case(
    loops: int = 2, recipe: str | None = "delayed", attention: bool = False, recompute: str = "none", **model: Any
) -> Case:
    """A bf16 case with FP8 linear layers; `recipe` None: without FP8."""
    fp8 = {} if recipe is None else {"fp8.format": "hybrid", "fp8.recipe": recipe, "fp8.attention": attention}
    return Case(loops, recompute, model={**FP8_MODEL, **model}, precision="bf16", parallel=UNFUSED, training=fp8)


def _forget_fp8_state() -> None:
    """Reset it after the jobs before in this process: their amax buffers would be reduced with this job's."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def fresh(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a job without the FP8 state of those before it."""
    _forget_fp8_state()
    return function(*args, **kwargs)


def train_fresh(layout: Layout, cases: list[Case]) -> list[Outcome]:
    """`train_cases`, with FP8 state of its own for each case."""
    from tests.distributed import parity

    outcomes = parity.train_all(layout, cases[:1])
    for case in cases[1:]:
        _forget_fp8_state()
        outcomes.append(parity._train(layout, case))
    return outcomes


# ---------------------------------------------------------------- what is quantized, and which attention runs


@dataclass
class Counts:
    """Counts of a call of the engine, `train` or `evaluate`.

    Attributes:
        weights: how often each parameter was quantized, by name.
        attentions: how often fused attention ran, by (FP8 or not, window).
    """

    call: str
    weights: dict[str, int] = field(default_factory=dict)
    attentions: dict[tuple[bool, tuple[int, int]], int] = field(default_factory=dict)


def count(layout: Layout, case: Case, generation: int = 9) -> tuple[list[Counts], Outcome]:
    """Train a case on a card of a generation and count."""
    from tests.distributed import parity
    from tests.te import emulation

    calls: list[Counts] = []
    with emulation.card(generation), _counting(calls):
        (outcome,) = parity.train_all(layout, [case])
    return calls, outcome


@contextlib.contextmanager
def _counting(calls: list[Counts]) -> Iterator[None]:
    from plt_megatron.train.megatron_engine import MegatronEngine

    extension = sys.modules["transformer_engine_torch"]
    quantize, attend = extension.quantize, extension.fused_attn_fwd
    names: dict[int, str] = {}
    weights: Counter[str] = Counter()
    attentions: Counter[tuple[bool, tuple[int, int]]] = Counter()

    def counted_quantize(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.data_ptr() in names:
            weights[names[tensor.data_ptr()]] += 1
        return quantize(tensor, *args, **kwargs)

    def counted_attention(*args: Any) -> Any:
        attentions[hasattr(args[16], "_fp8_dtype"), tuple(args[12])] += 1
        return attend(*args)

    def counted(call: str, stock: Any) -> Any:
        def run(engine: Any, *args: Any, **kwargs: Any) -> Any:
            names.update({value.data_ptr(): name for name, value in engine.stage.named_parameters()})
            weights.clear()
            attentions.clear()
            result = stock(engine, *args, **kwargs)
            calls.append(Counts(call, dict(weights), dict(attentions)))
            return result

        return run

    with (
        mock.patch.multiple(extension, quantize=counted_quantize, fused_attn_fwd=counted_attention),
        mock.patch.object(MegatronEngine, "train_step", counted("train", MegatronEngine.train_step)),
        mock.patch.object(MegatronEngine, "evaluate", counted("evaluate", MegatronEngine.evaluate)),
    ):
        yield


def train_without_cache(layout: Layout, case: Case) -> Outcome:
    """Train a case whose layers quantize their weights in every call."""
    from megatron.core.extensions import transformer_engine as layers

    from tests.distributed import parity

    def always(forward: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.disable_parameter_transpose_cache = True
            return forward(self, *args, **kwargs)

        return run

    with contextlib.ExitStack() as patched:
        for kind in (layers.TELinear, layers.TELayerNormColumnParallelLinear):
            patched.enter_context(mock.patch.object(kind, "forward", always(kind.forward)))
        return parity.train_all(layout, [case])[0]


# ---------------------------------------------------------------- checkpoints


def checkpoint_config(layout: dict[str, Any], recipe: str | None, **model: Any) -> Any:
    """A run configuration for `checkpoint_jobs`; `recipe` None: fp32 without FP8."""
    from plt_megatron.config.schema import Fp8Config
    from tests.distributed import checkpoint_jobs

    layout = {**layout, **UNFUSED}
    if recipe is None:
        return checkpoint_jobs.run_config(layout, **model)
    sizes = {**FP8_MODEL, "num_layers": 2, "kv_channels": 128}
    config = checkpoint_jobs.run_config(layout, "bf16", **{**sizes, **model})
    config.training.fp8 = Fp8Config(recipe=recipe, attention=recipe == "delayed")  # type: ignore[arg-type]
    return config


def save_then_go_on(directory: Path, config: Any, steps: int = 2, then: int = 2) -> dict[str, Any]:
    """Train, save and train on; the numbers after the save and the FP8 state at the save."""
    from tests.checkpoints import save_checkpoint
    from tests.distributed import checkpoint_jobs as jobs

    engine = jobs.build(config)
    jobs.train(engine, 1, steps)
    save_checkpoint(engine, directory, {"step": steps})
    state = fp8_state(engine)
    return {"after": jobs.train(engine, steps + 1, steps + then), "fp8": state}


def load_then_go_on(directory: Path, config: Any, then: int = 2) -> dict[str, Any]:
    """Load into a fresh engine and train on."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint
    from tests.distributed import checkpoint_jobs as jobs

    engine = jobs.build(config)
    step = load_checkpoint(engine, directory)["step"]
    state = fp8_state(engine)
    return {"after": jobs.train(engine, step + 1, step + then), "fp8": state}


def fp8_state(engine: Any) -> dict[str, Any]:
    """Scales and amax histories of every FP8 module of this rank, by its name in the whole model, as arrays."""
    import re

    found = {}
    for name, module in engine.stage.named_modules():
        match = re.match(r"decoder\.layers\.(\d+)(\..*)", name)
        if match is None or not getattr(module, "fp8_meta", None):
            continue
        number = engine.stage.decoder.layers[int(match[1])].layer_number
        for key in ("scaling_fwd", "scaling_bwd"):
            meta = module.fp8_meta.get(key)
            if meta is not None and hasattr(meta, "amax_history"):
                found[f"{number}{match[2]} {key}"] = (meta.scale.numpy().copy(), meta.amax_history.numpy().copy())
    return found


def state_around(config: Any, between: str) -> tuple[dict[str, Any], dict[str, Any], list]:
    """This rank's FP8 state after two steps, after `between` (a `validation` at one and at two loops, or a step that is
    `skipped`), and the numbers of a step after that."""
    from tests.distributed import checkpoint_jobs as jobs

    engine = jobs.build(config)
    jobs.train(engine, 1, 2)
    before = fp8_state(engine)
    if between == "validation":
        for loop_count in (1, 2):
            jobs.evaluate(engine, loop_count)
    elif between == "skipped":
        assert not engine.train_step(jobs.batches_of(7), lambda loss, norm: False).updated
    return before, fp8_state(engine), jobs.train(engine, 3, 3)


# ---------------------------------------------------------------- what a step costs besides its kernels


@dataclass
class Overhead:
    """Costs of a step over packed documents, or over rows of one text.

    Attributes:
        waits: the host's for the device, by place (`host_waits`).
        selections: how often the kernels of an attention were chosen.
        read: each attention's window, and where its Q, K and V lie, in order.
    """

    waits: dict[str, int]
    selections: int
    read: list[tuple[tuple[int, int], int, int, int]]


def overhead_of_a_step(packed: bool, **model: Any) -> Overhead:
    """Train two steps in bf16, and look at the second."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    from tests.distributed import checkpoint_jobs as jobs
    from tests.distributed.host_waits import HostWaits, packed_batches

    config = jobs.run_config(UNFUSED, "bf16", **{**FP8_MODEL, "num_layers": 2, **model})
    config.data.reset_at_document_boundaries = packed
    engine, extension = jobs.build(config), sys.modules["transformer_engine_torch"]
    utils = dot_product_attention.dpa_utils
    choose, attend = utils.get_attention_backend, extension.fused_attn_fwd
    batches = [packed_batches(2) if packed else jobs.batches_of(1)[:2] for _ in range(2)]
    found = Overhead({}, 0, [])

    def counted_choice(*args: Any) -> Any:
        found.selections += 1
        return choose(*args)

    def watched_attention(*args: Any) -> Any:
        found.read.append((tuple(args[12]), *(tensor.data_ptr() for tensor in args[16:19])))
        return attend(*args)

    engine.train_step(batches[0])
    with (
        mock.patch.object(utils, "get_attention_backend", counted_choice),
        mock.patch.object(extension, "fused_attn_fwd", watched_attention),
        HostWaits() as waits,
    ):
        engine.train_step(batches[1])
    found.waits = dict(waits.places)
    return found


def exchanged_and_estimated(layout: Layout, case: Case) -> tuple[float, float]:
    """Bytes that a rank sends to the ranks of its sequences in a step, and what the estimate says of them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from plt_megatron.predict.run_estimate import estimate_run
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.megatron_engine import MegatronEngine
    from tests.distributed import parity

    init_process_groups(parity._parallel(layout, case))
    config, sent = parity._config(layout, case), []
    real = {name: getattr(dist, name) for name in ("all_to_all_single", "P2POp")}
    real |= {name: getattr(dist, name) for name in ("all_gather_into_tensor", "reduce_scatter_tensor")}

    def count(tensor: Any, group: Any, times: float) -> None:
        if group is parallel_state.get_context_parallel_group():
            sent.append(tensor.numel() * tensor.element_size() * times)

    def all_to_all_single(output: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(args[:2]) and kwargs.get("input_split_sizes") is None:  # neighbors' rows have unequal parts
            count(rows, args[2] if len(args) > 2 else kwargs["group"], (layout.cp - 1) / layout.cp)
        return real["all_to_all_single"](output, rows, *args, **kwargs)

    def message(op: Any, tensor: Any, peer: Any, group: Any) -> Any:
        count(tensor, group, op is dist.isend)
        return real["P2POp"](op, tensor, peer, group)

    def all_gather_into_tensor(output: Any, rows: Any, group: Any = None, **kwargs: Any) -> Any:
        count(rows, group, layout.cp - 1)
        return real["all_gather_into_tensor"](output, rows, group=group, **kwargs)

    def reduce_scatter_tensor(output: Any, rows: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        count(rows, group, (layout.cp - 1) / layout.cp)
        return real["reduce_scatter_tensor"](output, rows, *args, group=group, **kwargs)

    engine = MegatronEngine(config, parity.VOCAB_SIZE)
    counted = (all_to_all_single, all_gather_into_tensor, reduce_scatter_tensor)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "P2POp", message))
        for function in counted:
            stack.enter_context(mock.patch.object(dist, function.__name__, function))
        engine.train_step(parity._batches(0, layout, case))
    estimate = estimate_run(config, world_size=layout.world_size, vocab_size=parity.VOCAB_SIZE)
    return sum(sent), estimate.communication["context parallel"]


def asked_otherwise(layout: Layout, case: Case) -> dict[str, set[tuple[Any, Any]]]:
    """Where the check before a run asks Transformer Engine's selector about another attention than those that run:
    field -> (asked, called)."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    from plt_megatron.runtime import kernels
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.megatron_engine import MegatronEngine
    from tests.distributed import parity

    init_process_groups(parity._parallel(layout, case))
    config, called = parity._config(layout, case), []
    utils = dot_product_attention.dpa_utils
    choose = utils.get_attention_backend

    def recorded(params: Any) -> Any:
        called.append(params)
        return choose(params)

    engine = MegatronEngine(config, parity.VOCAB_SIZE)
    with mock.patch.object(utils, "get_attention_backend", recorded):
        kernels._without_fused_attention(config)
        asked, called[:] = list(called), []
        engine.train_step(parity._batches(0, layout, case))
    assert {params.window_size for params in asked} == {params.window_size for params in called}
    # Documents differ from step to step; the masks' own lengths follow from them.
    unknown = {"batch_size", "max_seqlen_q", "max_seqlen_kv"} if case.packed else set()
    found: dict[str, set[tuple[Any, Any]]] = {}
    for mine in asked:
        for theirs in (params for params in called if params.window_size == mine.window_size):
            for name in set(vars(mine)) - unknown - {"fp8_meta"}:
                if getattr(mine, name) != getattr(theirs, name):
                    found.setdefault(name, set()).add((getattr(mine, name), getattr(theirs, name)))
    return found
