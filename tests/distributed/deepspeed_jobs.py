"""Jobs of the DeepSpeed tests: a tiny model, trained on either engine, saved and moved. Only workers import torch."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plt_megatron.errors import UserError
from tests.checkpoints import save_checkpoint
from tests.distributed.cases import VOCAB_SIZE, Case, Layout, Outcome
from tests.distributed.heard import heard

STEPS = 3


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed is asked to work; stage 0 stands for the megatron engine."""

    stage: int = 1
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_param: Literal["none", "cpu"] = "none"
    raw: tuple[tuple[str, Any], ...] = ()  # of zero_optimization

    def __str__(self) -> str:
        offload = {"optimizer": self.offload_optimizer, "parameters": self.offload_param}
        offloaded = [name for name, where in offload.items() if where == "cpu"]
        return f"ZeRO {self.stage}" + (f", {' and '.join(offloaded)} offloaded" if offloaded else "")


MEGATRON = Zero(0)


def enter() -> None:
    """Import DeepSpeed into this process, the server of a pool, and what its engine imports when it is built."""
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    enter_cpu_runtime(force=True)
    from plt_megatron.train.deepspeed import engine, runtime  # noqa: F401

    runtime.import_deepspeed()
    for name in (
        "deepspeed.module_inject.auto_ep_layer",
        "torch._dynamo.backends.debugging",
        "torch._inductor.compile_fx",
    ):
        importlib.import_module(name)


def with_engine(config: Any, zero: Zero) -> Any:
    """The configuration with the engine that `zero` asks for."""
    from plt_megatron.config.schema import DeepSpeedConfig

    if zero.stage == 0:
        return config
    raw = {"zero_optimization": dict(zero.raw)} if zero.raw else {}
    section = DeepSpeedConfig(zero.stage, zero.offload_optimizer, zero.offload_param, raw)
    return dataclasses.replace(config, deepspeed=section)


# ---------------------------------------------------------------- parity


def train_cases(layout: Layout, cases: list[tuple[Case, Zero]]) -> list[Outcome]:
    """Train each case for three steps: the numbers of `parity.train_case`, and the learning rate that comes next."""
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.build_engine import build_engine
    from tests.distributed import parity

    init_process_groups(parity._parallel(layout, Case()))
    outcomes = []
    for case, zero in cases:
        case = case.fitted(layout)
        with parity._randomized(case.zero_gates):
            engine = build_engine(with_engine(parity._config(layout, case), zero), VOCAB_SIZE)
        numbers = parity.train_case(engine, layout, case, STEPS)
        outcomes.append(Outcome({**numbers, "learning rate": engine.scheduler.lr}))
    return outcomes


def refuse_steps(layout: Layout, zeros: list[Zero], precision: str = "fp32") -> list[list[Any]]:
    """For each of `zeros`: four steps of which the second is refused and the third has a loss that is no number on one
    data-parallel rank; what was seen of them, whether weights, moments and step count stayed, and what was judged."""
    from megatron.core import parallel_state

    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.build_engine import build_engine
    from tests.distributed import parity

    case = Case(2, precision=precision).fitted(layout)
    init_process_groups(parity._parallel(layout, case))
    outcomes = []
    for zero in zeros:
        engine = build_engine(with_engine(parity._config(layout, case), zero), VOCAB_SIZE)
        broken: list[bool] = []
        engine.stage.embedding.register_forward_hook(
            lambda *call, broken=broken: call[-1] * math.nan if broken else None  # type: ignore[misc]
        )
        asked: list[tuple[float, float]] = []

        def judge(loss: float, norm: float, asked: list[tuple[float, float]] = asked) -> bool:
            asked.append((loss, norm))
            return math.isfinite(loss) and math.isfinite(norm) and len(asked) != 2

        seen: list[Any] = []
        for step in range(4):
            before = _everything(engine)
            broken[:] = [True] if step == 2 and parallel_state.get_data_parallel_rank() == 1 else []
            result = engine.train_step(parity._batches(step, layout, case), judge)
            broken.clear()
            after = _everything(engine)
            seen.append((result.updated, result.loss, result.grad_norm, before == after))
        outcomes.append([seen, asked])
    return outcomes


def _everything(engine: Any) -> str:
    """A hash over this rank's share of the state that a checkpoint would hold."""
    import torch

    from plt_megatron.train.checkpoint import state

    saved = engine.state.to_save()
    whole = hashlib.sha256(f"{saved['optimizer_step']} {saved['optimizer_later_step']}".encode())
    for tensor in state.sharded_tensors(saved):
        whole.update(tensor.key.encode())
        whole.update(tensor.data.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True)
class Place:
    """An engine in a layout; what tensor and pipeline parallelism leave of the processes is data parallel."""

    zero: Zero = MEGATRON
    tp: int = 1
    pp: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    loops: int = 2
    loop_schedule: bool = False

    def __str__(self) -> str:
        engine = "megatron" if self.zero == MEGATRON else str(self.zero)
        pipeline = f" PP{self.pp}" if self.pp > 1 else ""
        loops = " loops in turn" if self.loop_schedule else f" L{self.loops}" if self.loops != 2 else ""
        return f"{engine} TP{self.tp}{pipeline}{loops}{' bf16' if self.precision == 'bf16' else ''}"

    @property
    def layout(self) -> dict[str, Any]:
        """Settings of `ParallelConfig`."""
        return Layout(self.tp, self.tp > 1, self.pp).settings


@dataclass
class Journey:
    """Losses and gradient norms of a run that stayed, and of those that were loaded from its checkpoint elsewhere.

    Attributes:
        before: steps 1 to 3.
        stayed: steps 4 to 6 of the engine that saved.
        moved: the same of each engine that loaded.
        logs: what rank 0 said while each loaded.
        shapes: of the checkpoint's tensors, by key.
        digest, digests: each rank's whole state after step 6, of the one that stayed and of those that moved.
    """

    before: list[tuple[float, float]]
    stayed: list[tuple[float, float]]
    shapes: dict[str, tuple[int, ...]]
    digest: list[str]
    moved: list[list[tuple[float, float]]] = field(default_factory=list)
    logs: list[list[str]] = field(default_factory=list)
    digests: list[list[str]] = field(default_factory=list)


def _build(place: Place) -> Any:
    from megatron.core import parallel_state

    from plt_megatron.config.schema import LoopStage, RateFactors
    from plt_megatron.runtime.process_groups import init_process_groups
    from plt_megatron.train.build_engine import build_engine
    from tests.distributed import checkpoint_jobs as jobs

    config = with_engine(jobs.run_config(place.layout, place.precision, loop_count=place.loops), place.zero)
    if place.loop_schedule:
        config.training.loop_schedule = [LoopStage(loop_shares=[0.5, 0.5])]
        # No group has the general settings, so that the later loops' is the first.
        config.optimizer.lr_mult = RateFactors(embedding=0.5, head=0.5, hidden=0.5, gates=0.5, norms=0.5)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    init_process_groups(config.parallel)
    return build_engine(config, jobs.VOCAB)


def set_out(folder: Path, start: Place) -> Journey:
    """Train three steps, save, and go on for three.

    The checkpoint is written once those three steps are made, as an asynchronous save might be.
    """
    from plt_megatron.train.checkpoint.loading import _saved_entries
    from plt_megatron.train.checkpoint.saving import begin_save
    from tests.distributed import checkpoint_jobs as jobs

    engine = _build(start)
    before = jobs.train(engine, 1, 3)
    save = begin_save(engine, folder, {"step": 3}, staged=True)
    stayed, digest = jobs.train(engine, 4, 6), _everyones_state(engine)
    save.write()
    path = save.publish(2, 0)
    return Journey(before, stayed, _saved_entries(path)[0], digest)


def arrive(folder: Path, end: Place) -> tuple[list[tuple[float, float]], list[str], list[str]]:
    """Load what was saved into a fresh engine and go on for three steps: their numbers, what was logged, the state."""
    import torch

    from plt_megatron.train.checkpoint.loading import load_checkpoint
    from tests.distributed import checkpoint_jobs as jobs

    engine = _build(end)
    torch.manual_seed(99)
    messages: list[str] = []
    with heard(messages):
        load_checkpoint(engine, folder)
    return jobs.train(engine, 4, 6), messages, _everyones_state(engine)


def _everyones_state(engine: Any) -> list[str]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, _everything(engine))
    return everyone


def save_from(folder: Path, places: list[Place]) -> list[float]:
    """Three steps at each place, saved as `folder/<number>`; each one's loss on step 1's data."""
    from tests.distributed import checkpoint_jobs as jobs

    losses = []
    for number, place in enumerate(places):
        engine = _build(place)
        jobs.train(engine, 1, 3)
        save_checkpoint(engine, folder / str(number), {"step": 3})
        losses.append(jobs.evaluate(engine, 2))
    return losses


def save_copies_that_differ(folder: Path, place: Place, factor: float) -> str:
    """Save although rank 1 holds `factor` times the final norm; return the error, or what its copies are then."""
    import torch.distributed as dist

    from tests.distributed import checkpoint_jobs as jobs

    engine = _build(place)
    jobs.train(engine, 1, 1)
    norm = dict(engine.stage.named_parameters())["final_layernorm.weight"]
    pieces = engine.state._optimizer
    whole = pieces.gather(norm, "param").clone()
    pieces.scatter(norm, "param", whole * factor if dist.get_rank() == 1 else whole)
    try:
        save_checkpoint(engine, folder, {"step": 1})
    except UserError as error:
        return str(error)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, pieces.gather(norm, "param").tolist())
    return "equal" if everyones[0] == everyones[1] else "different"


def weights_then_all(folder: Path, place: Place) -> dict[str, Any]:
    """An engine that has trained already, given a checkpoint's weights alone, then all of it: its losses on step 1's
    data, and the next step's gradient norm and its optimizer's step."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint, load_weights
    from tests.distributed import checkpoint_jobs as jobs

    engine = _build(place)
    fresh = jobs.evaluate(engine, 2)
    jobs.train(engine, 1, 1)
    load_weights(engine, folder)
    outcome = {"fresh": fresh, "weights": jobs.evaluate(engine, 2)}
    outcome["weights step"] = engine.state.to_save()["optimizer_step"]
    outcome["first"] = jobs.train(engine, 1, 1)
    load_checkpoint(engine, folder)
    outcome["all"] = jobs.evaluate(engine, 2)
    outcome["all step"] = engine.state.to_save()["optimizer_step"]
    return outcome
