"""Key shift: mixing the previous token's keys, and values if it is learned, into each token's (`key_shift`).

Shapes: T tokens of a step, L loops, N rows (T tokens of one loop, or L * T), R requests, K key/value heads of this
rank, D the head dimension, P the numbers per layer that a token hands on to the next.
"""

import torch
from torch import nn

from vllm_plt.configuration_plt import PLTConfig
from vllm_plt.heads import Heads, sharded_parameter


def previous_rows(rows: torch.Tensor, starts: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
    """Return the predecessor of each of `rows` [T, n]; at the requests' first rows `starts` [R] it is `carried` [R, n].

    A start of T belongs to no request.
    """
    before = torch.cat([rows[:1], rows])
    before.index_copy_(0, starts, carried)
    return before[:-1]


class KeyCarry:
    """The previous tokens' keys that a pass reads, layer by layer, and the keys that it hands on.

    Args:
        carried: in a pass of one loop [R, layers, P], for the first row of each request; in a pass over the rows of a
            decode step [C, T, layers, P], for each row of loops 1..C. C is 1 if later loops' keys are not used.
        starts: [R], first row of each request; None for the rows of a decode step.
    """

    def __init__(self, carried: torch.Tensor, starts: torch.Tensor | None):
        self.carried, self.starts = carried, starts
        self.taken: list[torch.Tensor] = []

    def shift(self, taken: torch.Tensor) -> torch.Tensor:
        """Record the next layer's `taken` [N, P] of these tokens; return the previous tokens' [N, P]."""
        carried = self.carried[..., len(self.taken), :]
        if self.starts is not None:
            self.taken.append(taken)
            return previous_rows(taken, self.starts, carried)
        loops, tokens, width = carried.shape
        rows = taken.view(-1, tokens, width)
        self.taken.append(rows[:loops])
        return carried.expand(rows.shape).reshape(taken.shape)

    def handed_on(self) -> torch.Tensor:
        """Return what these tokens hand on: [T, layers, P], or [C, T, layers, P] in a decode step."""
        return torch.stack(self.taken, -2)


class KeyShift(nn.Module):
    """The key shift itself, applied before RoPE.

    "heads" shifts whole keys of the second half of the model's key/value heads. "channels" shifts, in every key, the
    half of the channels that RoPE rotates slowly. "learned" computes k_t + a (k_(t-1) - k_t), and the same of v_t with
    b; a and b are one number per head.
    """

    def __init__(self, config: PLTConfig, heads: Heads):
        super().__init__()
        self.form, self.heads, total = config.key_shift, heads, config.num_key_value_heads
        if self.form not in ("heads", "channels", "learned"):
            raise ValueError(f"key_shift {self.form!r} cannot be served yet: KeyShift has no equation for it")
        self.kept = min(max(total // 2 - heads.kv_shard * heads.kv, 0), heads.kv)  # heads of this rank
        # All ranks hand on the same number of heads, since vLLM needs the same page size on each.
        self.handed = min(heads.kv, total - total // 2)
        sizes = {"heads": self.handed * heads.dim, "channels": heads.kv_size // 2, "learned": 2 * heads.kv_size}
        self.width = sizes[self.form]  # P
        if self.form == "learned":
            self.key, self.value = (sharded_parameter(heads.kv, shard=heads.kv_shard) for _ in range(2))

    def forward(self, key: torch.Tensor, value: torch.Tensor, carry: KeyCarry) -> tuple[torch.Tensor, torch.Tensor]:
        """Return shifted key and value [N, K * D] from key and value [N, K * D]; `key` may be overwritten."""
        if self.form == "learned":
            shape = (2, self.heads.kv, self.heads.dim)
            own = torch.cat([key, value], 1)
            factors = torch.stack([self.key, self.value])[:, :, None]
            mixed = torch.lerp(own.unflatten(1, shape), carry.shift(own).unflatten(1, shape), factors)
            return mixed[:, 0].flatten(1), mixed[:, 1].flatten(1)
        by_head = key.unflatten(1, (self.heads.kv, self.heads.dim))
        if self.form == "heads":
            part, kept = by_head[:, self.heads.kv - self.handed :], self.kept - (self.heads.kv - self.handed)
        else:
            part, kept = by_head.unflatten(2, (2, 2, -1))[:, :, :, 1], 0  # RoPE pairs channel i with i + D / 2
        # Copied, so that what is handed on does not keep the whole projection output alive.
        taken = part.clone(memory_format=torch.contiguous_format)
        before = carry.shift(taken.view(len(key), self.width)).view(part.shape)
        part[:, kept:] = before[:, kept:]
        return key, value
