"""KV cache spec and manager of the carry: a sliding window of two tokens, of which the older one is read.

This is a separate module because vLLM's engine core unpickles the spec; importing the module registers it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_plt.vllm_internals import SlidingWindowManager, SlidingWindowSpec, register_cache_spec


@dataclass(frozen=True, kw_only=True)
class CarrySpec(SlidingWindowSpec):
    """KV cache spec of one slice of the carry; only the last token's is kept.

    Attributes:
        is_read_at_once: part of it is read before any of the step's is written, however many tokens the step has.
    """

    is_read_at_once: bool = False


class CarryManager(SlidingWindowManager):
    """KV cache manager that delays a request which needs a carry computed in the current step.

    vLLM publishes a block's hash when the step that computes it is scheduled, so a request may hit a block that another
    request computes in the same step. A loop-by-loop step handles this for hidden states, since h(l) of all tokens is
    stored before loop l + 1 reads it. But a step of one token per request runs all loops at once, and shifted keys read
    the carry first in every step: in both cases it is not there yet.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.published_this_step: set = set()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs,
    ) -> int:
        """Return more blocks than exist if the request must wait, so that the scheduler retries it in the next step."""
        at_once = self.kv_cache_spec.is_read_at_once or num_tokens_main_model - total_computed_tokens == 1
        if at_once and self.needs_carry_of_this_step(new_computed_blocks):
            return self.block_pool.num_gpu_blocks + 1
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            **kwargs,
        )

    def needs_carry_of_this_step(self, hit_blocks: Sequence) -> bool:
        """Return True if the last block hit, which holds the carry, is computed in this step."""
        return bool(hit_blocks) and hit_blocks[-1].block_hash in self.published_this_step

    def cache_blocks(self, request, num_tokens: int, *args, **kwargs) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        blocks = self.req_to_blocks[request.request_id][before:after]
        self.published_this_step.update(block.block_hash for block in blocks if block.block_hash is not None)

    def new_step_starts(self) -> None:
        self.published_this_step.clear()


register_cache_spec(CarrySpec, CarryManager)
