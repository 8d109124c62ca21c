"""Check that an export computes what the training model computes: the same text through both, in fp32."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import ParallelConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import prepare_imports
from plt_megatron.hf.checkpoint_writer import with_rows
from plt_megatron.hf.conversion import ParamMapping, mappings_for, to_hf
from plt_megatron.hf.sources import PRECISIONS, ModelSource, open_source
from plt_megatron.installation import own_python, python_path
from plt_megatron.model.parameters import is_buffer
from plt_megatron.run_folder.attempts import describe_exit
from plt_megatron.runtime.environment import environment_of_no_rank
from plt_megatron.runtime.local_processes import die_with_parent
from plt_megatron.train.checkpoint.reading import PADDED

TOLERANCE = 2e-5  # of logits in fp32, as a share of the largest: 30 layers of 576 channels show 2.3e-6
_TEXT = """\
The loop is an argument, never a global. In the first loop a layer attends to every earlier token and keeps its keys and
values; in later loops it attends to those, and to a window of its own. Numbers: 3.14159, 2,718, 0x7f, 1e-5.

def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

"Parallel over tokens, serial over loops," she said; "and then, in decoding, parallel over loops as well."
A text needs accents, too: d\u00e9j\u00e0 vu, \u03b1\u03b2\u03b3, \u4f60\u597d. The quick brown fox jumps over.
"""


def largest_difference(source: ModelSource, folder: Path, precision: str, style: str) -> tuple[float, int]:
    """Compare the export with the training model; return (largest difference of logits as a share of the largest logit,
    tokens compared).

    A process of its own does it: megatron-core's CPU runtime would take the GPU from this one for good, and
    transformers would leave a copy of the folder's code in the user's home, which may not be writable.
    """
    tokenizer = None if source.tokenizer is None else str(source.tokenizer.path)
    arguments = [str(source.path), tokenizer, source.ema, str(folder), precision, style]
    with TemporaryDirectory() as modules:
        done = subprocess.run(
            [*own_python(), "-m", "plt_megatron.hf.verification", json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={"HF_MODULES_CACHE": modules, **environment_of_no_rank(), "PYTHONPATH": python_path()},
            process_group=0,  # Ctrl-C reaches it only through us
            check=False,
        )
    if done.returncode:
        raise UserError(f"the verification {describe_exit(done.returncode)}; nothing is written")
    answer = json.loads(done.stdout.splitlines()[-1])  # after what libraries print
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["difference"], answer["tokens"]


def _main(path: str, tokenizer: str | None, ema: bool, folder: str, precision: str, style: str) -> dict[str, Any]:
    """Both models hold the weights as exported and compute in fp32. One model is in memory at a time."""
    prepare_imports()
    logging.getLogger().setLevel(logging.ERROR)  # the caller has logged what is doubtful about the source
    try:
        source = open_source(Path(path), Path(tokenizer) if tokenizer else None, ema=ema, verify=False)
        tokens = _tokens(source, Path(folder))
        expected = _megatron_logits(source, tokens, PRECISIONS[precision])
        actual = _hf_logits(Path(folder), tokens, style)
    except UserError as error:
        return {"error": str(error)}
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return {"difference": float((actual - expected).abs().max() / largest), "tokens": tokens.shape[1]}


def _tokens(source: ModelSource, folder: Path) -> Tensor:
    """Return a text of more than two windows, or of more than one where two are over 512 tokens, if the model takes
    that much, [1, n]; without a tokenizer, random ids."""
    window = source.model.window_size
    length = min(source.max_position_embeddings, max(min(2 * window + 32, 512), window + 32, 64))
    generator = torch.Generator().manual_seed(1234)
    ids: list[int] = []
    if source.tokenizer is not None:
        ids = source.tokenizer.encode(_TEXT)
        _check_tokenizer(folder, ids)
    if len(ids) < length:
        ids += torch.randint(source.vocab_size, (length - len(ids),), generator=generator).tolist()
    return torch.tensor([ids[:length]])


def _check_tokenizer(folder: Path, expected: list[int]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    if ids != expected:
        raise UserError("the exported tokenizer does not encode like the one used in training; nothing is written")


# ---------------------------------------------------------------- the training model


def _megatron_logits(source: ModelSource, tokens: Tensor, export_dtype: torch.dtype) -> Tensor:
    """Return logits [1, n, vocabulary], float32."""
    with single_process():
        from plt_megatron.model.looped_gpt import MicroBatch

        model = build_model(source, tokens.shape[1])
        dtype = {True: torch.float32, False: export_dtype}
        weights = ((name, tensor.to(dtype[is_buffer(name)]).float()) for name, tensor in source.weights())
        fill_model(model, weights, mappings_for(source.model, source.vocab_size))
        with torch.no_grad():
            logits = model.eval()(MicroBatch(tokens=tokens))
        return logits[..., : source.vocab_size].float()


def build_model(source: ModelSource, sequence_length: int) -> Any:
    """Build the training model in fp32 on this process's CPU, on the torch backend. Process groups must exist."""
    from plt_megatron.model.looped_gpt import LoopedGPT
    from plt_megatron.model.transformer_config import transformer_config

    settings = dataclasses.replace(source.model, backend="torch")
    return LoopedGPT(
        transformer_config(settings, ParallelConfig(), precision="fp32"),
        source.vocab_size,
        sequence_length,
        padded_vocab_size=derived.padded_vocab_size(settings, source.vocab_size),
    )


def fill_model(stage: Any, weights: Iterator[tuple[str, Tensor]], mappings: list[ParamMapping]) -> None:
    """Load a stage's part of whole weights, whatever its place in the layout; vocabulary padding becomes zero.

    Raises:
        UserError: a parameter or buffer gets no weights, or has another shape.
    """
    from plt_megatron.model.build import global_tensors

    parameters = dict(global_tensors(stage))
    by_name = {mapping.name: mapping for mapping in mappings}
    group = stage.pg_collection.tp
    for name, whole in weights:
        parameter = parameters.pop(name, None)
        if parameter is None:  # another pipeline stage's
            continue
        if name in PADDED:
            whole = with_rows(whole, stage.padded_vocab_size)
        part = by_name[name].parameter.part_of_rank(whole, group.rank(), group.size())
        if part.shape != parameter.shape:
            raise UserError(f"{name} has shape {tuple(part.shape)}, the model's {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(part)
    if parameters:
        raise UserError(f"no weights for {', '.join(sorted(parameters))}")


@contextmanager
def single_process() -> Iterator[None]:
    """Set up megatron-core's process groups for a job of one process."""
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    enter_cpu_runtime(force=True)
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    init_process_groups(ParallelConfig())
    try:
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        destroy_process_groups()


# ---------------------------------------------------------------- the exported model


def _hf_logits(folder: Path, tokens: Tensor, style: str) -> Tensor:
    """Return logits [1, n, vocabulary], float32."""
    if style == "loopcoder":
        model = export_of(open_source(folder), torch.float32)  # it has no code of its own
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits.float()


@torch.no_grad()
def export_of(source: ModelSource, dtype: torch.dtype) -> Any:
    """Build a `PLTForCausalLM` with a source's weights, read one tensor at a time. Buffers stay in fp32."""
    from plt_megatron.hf.config_keys import plt_keys
    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    model: Any = PLTForCausalLM(PLTConfig.from_dict(plt_keys(source, "float32")))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, tensor in to_hf(source.weights(), mappings_for(source.model, source.vocab_size)):
        if is_buffer(name):
            buffers[name].data = tensor.float().clone()
        else:
            parameters[name].copy_(tensor)
    return model


if __name__ == "__main__":
    die_with_parent()
    print(json.dumps(_main(*json.loads(sys.argv[1]))))
