"""Kind of cache for what tokens hand on to the next: a window of two tokens, of which the older one is read.

A module of its own, since vLLM's engine core unpickles the specification, imports this and so makes it known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_plt.vllm_internals import SlidingWindowManager, SlidingWindowSpec, register_cache_spec


@dataclass(frozen=True, kw_only=True)
class CarrySpec(SlidingWindowSpec):
    """One slice of a token's carried states; the token before the next one is kept.

    is_read_at_once: something of it is read before any of a step's is written, however many tokens the step has.
    """

    is_read_at_once: bool = False


class CarryManager(SlidingWindowManager):
    """Keeps a request that needs a carry of this very step from running in it.

    vLLM publishes a block's hash when the step that computes it is scheduled, so a request may hit a block that another
    one computes in the same step. Where a step runs loop by loop that is right for hidden states, since h(l) of all
    tokens is stored before loop l + 1 reads. In a step of one token a request all loops run at once, and shifted keys
    take from the tokens before in every step: the carry is not there yet.
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
        """More blocks than there are make the scheduler try again in the next step."""
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
        """Whether the last block hit, which holds the carry, is computed in this step."""
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
