"""This tensor-parallel rank's share of the heads, and parameters sharded the same way."""

import torch
from torch import nn

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.vllm_internals import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size


def load_shard(shard: int):
    """Return a weight loader that copies the `shard`-th slice of the first dimension, as long as the parameter's."""

    def load(param: nn.Parameter, loaded: torch.Tensor) -> None:
        size = param.shape[0]
        param.data.copy_(loaded.narrow(0, shard * size, size))

    return load


def sharded_parameter(*shape: int, shard: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)
    param.weight_loader = load_shard(shard)
    return param


class Heads:
    """This rank's share of the heads; key/value heads are replicated if there are fewer of them than ranks."""

    def __init__(self, config: PLTConfig):
        ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        total, total_kv = config.num_attention_heads, config.num_key_value_heads
        if total % ranks or max(total_kv, ranks) % min(total_kv, ranks):
            raise ValueError(f"{total} query and {total_kv} key/value heads do not divide over {ranks} ranks")
        self.query, self.kv = total // ranks, max(1, total_kv // ranks)
        self.kv_shard = self.rank * min(total_kv, ranks) // ranks
        self.dim = config.head_dim
        self.query_size, self.kv_size = self.query * self.dim, self.kv * self.dim
