"""KV cache memory of a request."""

from collections.abc import Iterable

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.vllm_internals import VllmConfig, init_logger

logger = init_logger("vllm.plt")
_SMALL_CHUNK = 256


def layers_of_a_group(counts: Iterable[int]) -> int:
    """Return how many layers vLLM puts into a KV cache group, given their counts by kind; it pads the last group."""
    present = [count for count in counts if count]
    return max(present) if max(present) < 1.5 * min(present) else min(present)


def caches_of_loops(config: PLTConfig, loops: int) -> tuple[int, int]:
    """Return how many caches hold the whole context, later loops' own included, and how many hold a window."""
    later = 0 if config.shares_values else len(config.full_loops(loops)) - 1
    looped = len(config.looped_layers)
    return config.num_hidden_layers + later * looped, len(config.window_loops(loops)) * looped


def slices_of_a_carry(config: PLTConfig, loops: int, fewest: int) -> int:
    """Return into how many slices to cut a token's carry, at least `fewest`.

    It is the number for which vLLM's groups pad the full-context caches least, and then for which they are fewest. If
    all layers loop it is the number of layers, or a multiple.
    """
    layers, caches = config.num_hidden_layers, caches_of_loops(config, loops)

    def cost(slices: int) -> tuple[int, int, int]:
        size = layers_of_a_group([*caches, slices])
        groups = [-(-count // size) for count in (*caches, slices)]
        return groups[0] * size, sum(groups), -slices

    return min(range(max(fewest, -(-layers // 4)), -(-fewest // layers) * layers + 1), key=cost)


def blocks_of_a_request(config: PLTConfig, loops: int, slices: int, length: int, block: int, chunk: int) -> int:
    """Return how many blocks, each all layers' K/V of `block` tokens, vLLM plans for a request of `length` tokens.

    `slices` is the number of slices of the carry, 0 if there is none. Windows and carries also hold the `chunk` tokens
    that may be in flight, and may begin anywhere in a block.
    """

    def held(tokens: int) -> int:
        return -(-min(tokens + chunk, length) // block) + 1

    counts = (*caches_of_loops(config, loops), slices)
    size = layers_of_a_group(counts)
    context, windows, carries = (-(-count // size) for count in counts)
    blocks = context * -(-length // block) + windows * held(config.window_size - 1) + carries * held(1)
    return -(-blocks * size // config.num_hidden_layers)


def say_what_chunks_cost(config: PLTConfig, loops: int, slices: int, vllm_config: VllmConfig) -> None:
    """Log one line if smaller prefill chunks would let at least a quarter more requests run at once."""
    if loops == 1 and not slices:
        return
    length, block = vllm_config.model_config.max_model_len, vllm_config.cache_config.block_size
    chunk, steps = vllm_config.max_in_flight_tokens, vllm_config.max_concurrent_batches  # two if scheduling is async
    now, small = (
        blocks_of_a_request(config, loops, slices, length, block, size) for size in (chunk, steps * _SMALL_CHUNK)
    )
    if now >= 1.25 * small:
        logger.info_once(
            f"PLT: a request of {length} tokens holds {now} blocks, where a plain model's holds {-(-length // block)}, "
            f"since {chunk} tokens may be in flight; with --max-num-batched-tokens {_SMALL_CHUNK} it holds "
            f"{small}"
        )
