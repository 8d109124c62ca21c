"""Builds the models of configurations without memory, and counts: a program of its own, run by test_shipped_configs.

FakeTensorMode gives every tensor a shape and no data, so that 7B at its full length takes a second; the process group
is torch's fake one. Prints one JSON object a configuration.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings

from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

warnings.filterwarnings("ignore")
enter_cpu_runtime(force=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import tensor_parallel  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from plt_megatron.config import derived  # noqa: E402
from plt_megatron.config.loader import load_config  # noqa: E402
from plt_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig  # noqa: E402
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch  # noqa: E402
from plt_megatron.model.transformer_config import transformer_config  # noqa: E402
from plt_megatron.runtime.process_groups import init_process_groups  # noqa: E402

DEFAULT_VOCAB = 8192  # where the tokenizer would say


def build(model: ModelConfig, length: int, vocab_size: int) -> LoopedGPT:
    padded = derived.padded_vocab_size(model, vocab_size)
    return LoopedGPT(transformer_config(model, ParallelConfig()), vocab_size, length, padded_vocab_size=padded)


def causal(query: torch.Size, *unused: object, out_shape: object = None, **also_unused: object) -> int:
    """Q K^T and its softmax times V over the keys that the mask leaves."""
    batch, heads, length, channels = query
    return 4 * batch * heads * channels * length * (length + 1) // 2


def causal_backward(grad_out: torch.Size, query: torch.Size, *unused: object, **also_unused: object) -> int:
    """Gradients of both products, each two products; recomputed scores are not the model's."""
    return 2 * causal(query)


def flops(model: ModelConfig, length: int, vocab_size: int) -> tuple[int, int]:
    """(forward, forward and backward) of one sequence, as FlopCounterMode sees it.

    torch has no formula for the CPU's fused attention; it gets the masked one.
    """
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: causal,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_backward,
    }
    built = build(model, length, vocab_size)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        losses = built(MicroBatch(tokens=tokens, labels=tokens))
        forward = counter.get_total_flops()
        losses.sum().backward()
    return forward, counter.get_total_flops()


def main() -> None:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    init_process_groups(ParallelConfig())
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    # A run's model is also a file of its own: counted once, at the run's length.
    counted: dict[str, str] = {}
    for path in sorted(sys.argv[1:], key=lambda path: "/runs/" not in path):
        config = load_config(path)
        key = repr(config.model)
        if key not in counted:
            counted[key] = json.dumps(count(config))
        print(path, counted[key], sep="\t")


def count(config: RunConfig) -> dict[str, int]:
    """Parameters, and FLOPs of a sequence, of one configuration's model. Without data no token can choose its experts:
    of a mixture of experts the parameters alone."""
    model, length = dataclasses.replace(config.model, backend="torch"), config.data.sequence_length
    vocab_size = model.vocab_size or DEFAULT_VOCAB
    parameters = sum(parameter.numel() for parameter in build(model, length, vocab_size).parameters())
    if model.moe is not None:
        return {"parameters": parameters, "vocab": vocab_size}
    # Every layer costs the same: two depths say what one layer costs, exactly.
    shallow, deeper = (flops(dataclasses.replace(model, num_layers=depth), length, vocab_size) for depth in (1, 2))
    forward, training = (one + (model.num_layers - 1) * (two - one) for one, two in zip(shallow, deeper, strict=True))
    return {
        "parameters": parameters,
        "forward": forward,
        "training": training,
        "vocab": vocab_size,
        "length": length,
    }


if __name__ == "__main__":
    with FakeTensorMode():  # one for all: masks are cached
        main()
