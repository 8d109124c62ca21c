"""What a request holds of vLLM's paged memory."""

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.vllm_internals import VllmConfig, init_logger

logger = init_logger("vllm.plt")
_SMALL_CHUNK = 256


def blocks_of_a_request(config: PLTConfig, loops: int, carries: int, length: int, block: int, chunk: int) -> int:
    """Blocks of `block` tokens of all layers' K/V that vLLM plans for a request of `length` tokens.

    What a token hands on to the next takes `carries` blocks. Windows and carries also hold the `chunk` tokens that a
    step may have in flight, and begin anywhere in a block.
    """

    def held(tokens: int) -> int:
        return -(-min(tokens + chunk, length) // block) + 1

    later = loops - 1
    blocks = -(-length // block) * (1 if config.share_kv else loops)
    blocks += later * held(config.window_size - 1) if config.gated_window else 0
    return blocks + carries * held(1)


def say_what_chunks_cost(config: PLTConfig, loops: int, carries: int, vllm_config: VllmConfig) -> None:
    """Log one line if smaller chunks would let at least a quarter more requests run at once."""
    if loops == 1 and not carries:
        return
    length, block = vllm_config.model_config.max_model_len, vllm_config.cache_config.block_size
    chunk = vllm_config.scheduler_config.max_num_batched_tokens
    now, small = (blocks_of_a_request(config, loops, carries, length, block, size) for size in (chunk, _SMALL_CHUNK))
    if now >= 1.25 * small:
        logger.info_once(
            f"PLT: a request of {length} tokens holds {now} blocks, where a plain model's holds {-(-length // block)}, "
            f"since a step may have {chunk} tokens in flight; with --max-num-batched-tokens {_SMALL_CHUNK} it holds "
            f"{small}"
        )
