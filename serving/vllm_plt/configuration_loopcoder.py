"""LoopCoder-v2's configuration (arXiv 2606.18023) as a PLTConfig."""

from vllm_plt.configuration_plt import PLTConfig


class LoopCoderConfig(PLTConfig):
    """PLTConfig that is set by LoopCoder-v2's keys.

    Args:
        plt_num_loops (`int`): L.
        plt_window_size (`list[int]`): number of keys before and after the query; the latter must be 0.
        plt_normalize_per_loop (`bool`): apply the final norm to every loop's output.
        plt_emb_scale, plt_hidden_scale (`float`): scales of the input of loops >= 2; None means 1.
        plt_gate_use_hidden_states (`bool`): compute the gate from the layer's input instead of the query.
    """

    model_type = "iquestpltcoder"

    bos_token_id: int | None = 1
    max_position_embeddings: int = 131072
    plt_num_loops: int = 2
    plt_window_size: list[int] | None = None
    plt_normalize_per_loop: bool = True
    plt_emb_scale: float | None = None
    plt_hidden_scale: float | None = None
    plt_gate_use_hidden_states: bool = False

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and not kwargs.get("rope_scaling"):
            kwargs.setdefault("rope_theta", 500000.0)
        before, after = self.plt_window_size or (64, 0)
        if after != 0:
            raise ValueError(f"plt_window_size [{before}, {after}] looks ahead: only [n, 0] is known")
        self.loop_count = self.plt_num_loops
        self.window_size = before + 1  # the query itself counts
        self.gate_input = "hidden" if self.plt_gate_use_hidden_states else "query"
        self.gate_side = "global"
        self.norm_between_loops = self.plt_normalize_per_loop
        self.embedding_scale = 1.0 if self.plt_emb_scale is None else float(self.plt_emb_scale)
        self.hidden_scale = 1.0 if self.plt_hidden_scale is None else float(self.plt_hidden_scale)
        super().__post_init__(**kwargs)
