"""Jobs the checkpoint tests run over processes: a tiny model, trained, saved and loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plt_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from plt_megatron.errors import UserError
from plt_megatron.run_folder.checkpoints import latest_checkpoint
from plt_megatron.runtime.process_groups import init_process_groups
from tests.checkpoints import save_checkpoint
from tests.distributed.heard import heard
from tests.settings import make

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH, BATCH = 117, 16, 8
ROWS = 2  # of a microbatch
# Settings of `run_config`.
SCALES = {"loop_norm": "rms", "learned_hidden_scale": "channel"}
EXPERTS = {
    "moe.num_experts": 4,
    "moe.ffn_hidden_size": 24,
    "moe.z_loss_coeff": 1e-3,
    "moe.router_score_function": "sigmoid",
    "moe.router_bias_update_rate": 0.02,
    "moe.first_k_dense_replace": 1,
}


def run_config(
    layout: dict[str, Any] | None = None, precision: str = "fp32", optimizer: str = "adam", **model: Any
) -> RunConfig:
    """Sizes no power of two divides, so that buffers need padding between parameters and between buckets."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 40,
        "ffn_hidden_size": 56,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "window_size": 5,
        "make_vocab_size_divisible_by": 7,  # 119 rows, 126 with TP 2
    }
    return RunConfig(
        model=make(ModelConfig, {**sizes, **model}),
        parallel=ParallelConfig(**(layout or {})),
        data=DataConfig(sequence_length=LENGTH),
        training=TrainingConfig(micro_batch_size=ROWS, global_batch_size=BATCH, train_iters=20, precision=precision),
        optimizer=OptimizerConfig(name=optimizer, lr=3e-3, min_lr=1e-4, lr_warmup_iters=2),
        checkpoint=CheckpointConfig(),
    )


def build(config: RunConfig, vocab_size: int = VOCAB) -> Any:
    """A fresh engine; the process groups are made on the way."""
    from megatron.core import parallel_state

    from plt_megatron.train.megatron_engine import MegatronEngine

    if not parallel_state.model_parallel_is_initialized():
        init_process_groups(config.parallel)
    return MegatronEngine(config, vocab_size)


def train(engine: Any, first: int, last: int) -> list[tuple[float, float]]:
    """Steps `first` .. `last`, each on data of its own: (loss, gradient norm) per step. Under a loop schedule every
    other step has one loop."""
    results = []
    for step in range(first, last + 1):
        loops = 1 if engine.config.training.loop_schedule and step % 2 else None
        results.append(engine.train_step(batches_of(step), loop_count=loops))
    return [(result.loss, result.grad_norm) for result in results]


def batches_of(step: int) -> list[Any]:
    """This rank's microbatches of a step's data."""
    from megatron.core import parallel_state

    from plt_megatron.model.looped_gpt import MicroBatch

    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = range(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    text = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    parts = [text[row : row + ROWS] for row in own[::ROWS]]
    return [MicroBatch(part[:, :-1], labels=part[:, 1:].contiguous()) for part in parts]


def evaluate(engine: Any, loop_count: int) -> float:
    """Mean loss on step 1's data."""
    total, tokens = engine.evaluate(batches_of(1), loop_count)
    return total / tokens


def digest(engine: Any) -> str:
    """One hash over the bits of this rank's parameters, buffers, main parameters, moments and learning rates."""
    engine.gather_parameters()
    tensors = [*engine.stage.parameters(), *engine.stage.buffers()]
    for part in engine.state.parts:
        for group in part.inner.param_groups:
            tensors.append(torch.tensor([group["lr"], group["weight_decay"]], dtype=torch.float64))
            for main in group["params"]:
                tensors += [main, *(value for _, value in sorted(part.inner.state[main].items()))]
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def train_and_save(directory: Path, config: RunConfig, steps: int = 3, then: int = 0, **arguments: Any) -> dict:
    """Train, save, and train on for `then` steps."""
    engine = build(config)
    before = train(engine, 1, steps)
    path = save_checkpoint(engine, directory, {"step": steps, "tokens": steps * BATCH * LENGTH}, **arguments)
    after = train(engine, steps + 1, steps + then)
    return {"before": before, "after": after, "digest": digest(engine), "path": path}


def load_and_train(path: Path, config: RunConfig, then: int = 3, weights_only: bool = False, **arguments: Any) -> dict:
    """Load into a fresh engine and train `then` steps; what rank 0 logged comes back as `log`."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint, load_weights

    engine = build(config)
    messages: list[str] = []
    with heard(messages):
        progress = (load_weights if weights_only else load_checkpoint)(engine, path, **arguments)
    step = 0 if weights_only else progress["step"]
    return {
        "progress": progress,
        "after": train(engine, step + 1, step + then),
        "digest": digest(engine),
        "log": messages,
    }


def resume_bit_for_bit(directory: Path, layout: dict[str, Any], precisions: tuple[str, ...], **model: Any) -> list:
    """For each precision, the numbers of a run that never stopped and of one that was saved and loaded."""
    outcomes = []
    for precision in precisions:
        config = run_config(layout, precision, **model)
        whole = train_and_save(directory / precision, config, then=3)
        # Nothing may be left over from the first run: new groups, other random states.
        destroy = _leave_and_rejoin(config)
        torch.manual_seed(99)
        resumed = load_and_train(directory / precision, dataclasses.replace(config))
        destroy()
        outcomes.append((whole["after"], whole["digest"], resumed["after"], resumed["digest"], whole["before"]))
    return outcomes


def _leave_and_rejoin(config: RunConfig) -> Any:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    init_process_groups(config.parallel)
    return parallel_state.destroy_model_parallel


def train_save_evaluate(directory: Path, config: RunConfig) -> float:
    """Train three steps, save, and give the loss with one loop."""
    engine = build(config)
    train(engine, 1, 3)
    save_checkpoint(engine, directory, {"step": 3})
    return evaluate(engine, loop_count=1)


def error_of_load(path: Path, config: RunConfig, vocab_size: int = VOCAB) -> str:
    """The message of the UserError that loading ends with."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint

    try:
        load_checkpoint(build(config, vocab_size), path)
    except UserError as error:
        return str(error)
    return "no error"


def edit_progress(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Edit what a checkpoint says of its run; its manifest knows nothing of that file then."""
    progress, manifest = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("progress", "manifest"))
    edit(progress)
    del manifest["files"]["progress.json"]
    for name, content in (("progress", progress), ("manifest", manifest)):
        (checkpoint / f"{name}.json").write_text(json.dumps(content))
    return progress


def stored_tensors(directory: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of a folder's last one, whose key has the prefix, as torch reads them."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(directory if (directory / ".metadata").exists() else latest_checkpoint(directory))
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
    }
    with warnings.catch_warnings(action="ignore"):
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def main_parameters(path: Path, config: RunConfig) -> str:
    """A hash over the bits of the fp32 main parameters after loading."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint

    engine = build(config)
    load_checkpoint(engine, path)
    return _hash_of_main(engine)


def go_on_in_fp32(folder: Path) -> list[tuple[bool, bool]]:
    """Train in bf16, save, and load in fp32; return by rank whether its main parameters are the saved ones, and whether
    its model's are those of the first rank."""
    import torch.distributed as dist

    from plt_megatron.train.checkpoint.loading import load_checkpoint

    before, after = build(run_config(precision="bf16")), build(run_config())
    train(before, 1, 2)
    load_checkpoint(after, save_checkpoint(before, folder, {"step": 2, "tokens": 256}))
    own = torch.cat([parameter.detach().flatten() for parameter in after.stage.parameters()])
    first = own.clone()
    dist.broadcast(first, 0)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (_hash_of_main(after) == _hash_of_main(before), torch.equal(own, first)))
    return found


def _hash_of_main(engine: Any) -> str:
    whole = hashlib.sha256()
    for main in engine.state.parts[0].pieces().values():
        whole.update(main.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()
