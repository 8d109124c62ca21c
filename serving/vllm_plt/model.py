"""PLT for vLLM (arXiv 2510.24824): prompts run loop by loop, a decode step runs all loops at once.

    h(1) = f(E)      h(l) = f(embedding_scale * E + hidden_scale * shift(h(l-1)))      logits = Head(norm(h(L)))

With `loop_span`, f is the layers of that range. The layers before it (prelude) run once on the embeddings, and E is
their output; the layers after it (coda) run once on h(L). Both have one row per token, in a decode step too.

A step in which every request has one new token runs all loops as rows of one batch: row 1 is E, row l combines E with
the h(l-1) that the previous position left in the KV cache. Any other step (prompts, drafts to verify) runs loop by loop
over all its tokens, since loop l of the second token needs loop l - 1 of the first.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vllm_plt.carry import CODA_KEYS, HIDDEN, KEYS, PRELUDE_KEYS, Carry
from vllm_plt.key_shift import previous_rows
from vllm_plt.layers import PLTDecoderLayer
from vllm_plt.lora import RowAdapters
from vllm_plt.memory import say_what_chunks_cost
from vllm_plt.passes import Stack, layers_pass, rows_pass
from vllm_plt.settings import read_settings
from vllm_plt.vllm_internals import (
    Attention,
    AutoWeightsLoader,
    LogitsProcessor,
    ParallelLMHead,
    RMSNorm,
    SupportsLoRA,
    SupportsQuant,
    VllmConfig,
    VocabParallelEmbedding,
    WeightsMapper,
    init_logger,
    leave_piecewise_graphs,
    maybe_prefix,
    padding_of_rows,
)
from vllm_plt.weights import ReadTensors

logger = init_logger("vllm.plt")


class LoopInput(nn.Module):
    """Input of loops >= 2: embedding_scale * E + hidden_scale * N(h), where N is the identity or divides by the RMS."""

    def __init__(self, config):
        super().__init__()
        self.embedding_scale, self.norm, self.eps = config.embedding_scale, config.hidden_norm, config.rms_norm_eps
        self.hidden_scale = config.hidden_scale
        if config.learned_hidden_scale != "none":
            size = config.hidden_size if config.learned_hidden_scale == "channel" else 1
            self.hidden_scale = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, embeds: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input [..., T, d] from E [T, d] and h [..., T, d], which is shifted with cross_loop_parallel."""
        if self.norm:
            x = hidden_states.float()
            hidden_states = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).to(hidden_states.dtype)
        return self.embedding_scale * embeds + self.hidden_scale * hidden_states


class PLTModel(nn.Module):
    """Embedding, decoder layers (all or some of them looped), final norm, and the carry."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config, settings = vllm_config.model_config.hf_config, read_settings(vllm_config)
        self.config = config
        self.settings = settings
        loops, rows, count = settings.loop_count, settings.parallel, config.num_hidden_layers
        self.looped = config.looped_layers if loops > 1 else range(count)
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        how = [(loops, rows) if index in self.looped else (1, False) for index in range(count)]
        self.layers = nn.ModuleList(
            PLTDecoderLayer(config, index, *how[index], prefix, vllm_config) for index in range(count)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.loop_input = None
        if loops > 1 and (config.cross_loop_parallel or config.input_injection):
            self.loop_input = LoopInput(config)
        self.carry = self._carry(prefix, vllm_config)
        self._make_passes(loops, rows, vllm_config)
        self.adapters = None
        if rows and vllm_config.lora_config is not None:
            self.adapters = RowAdapters(self.layers[self.looped.start : self.looped.stop], loops)
        # At least two: torch.compile treats a size of one as a constant.
        self.most_requests = max(vllm_config.scheduler_config.max_num_seqs, 2)

    def _make_passes(self, loops: int, rows: bool, vllm_config: VllmConfig) -> None:
        config, last = self.config, loops - 1
        before, looped, after = (
            Stack(self.layers[part.start : part.stop], self.norm)
            for part in (range(self.looped.start), self.looped, range(self.looped.stop, len(self.layers)))
        )

        def once(name: str, stack: Stack, is_normed: bool) -> nn.Module | None:
            return layers_pass(name, stack, 0, vllm_config, is_normed=is_normed) if stack.layers else None

        self.prelude, self.coda = once("PLTPrelude", before, False), once("PLTCoda", after, True)
        # A coda reads h(L) without the norm, whatever the loops read.
        are_normed = [config.norm_between_loops] * last + [self.coda is None]
        keeps_keys = config.share_kv and not config.share_values and loops > 1
        self.passes = nn.ModuleList(
            layers_pass(
                f"PLTLoop{loop}",
                looped,
                loop,
                vllm_config,
                is_normed=is_normed,
                keeps_keys=keeps_keys and loop == 0,
            )
            for loop, is_normed in enumerate(are_normed)
        )
        self.rows = None
        if rows:
            self.rows = rows_pass(looped, vllm_config, are_normed=are_normed[0], is_normed=are_normed[-1])

    def _carry(self, prefix: str, vllm_config: VllmConfig) -> Carry | None:
        config, loops, layers = self.config, self.settings.loop_count, len(self.layers)
        attention, states = self.layers[0].self_attn, {}
        if config.cross_loop_parallel and loops > 1:
            states[HIDDEN] = (loops - 1, config.hidden_size)
        if attention.key_shift is not None:
            width, first, end = attention.key_shift.width, self.looped.start, self.looped.stop
            states[KEYS] = (config.loops_with_keys(loops), len(self.looped) * width)
            once = {PRELUDE_KEYS: (1, first * width), CODA_KEYS: (1, (layers - end) * width)}
            states |= {kind: state for kind, state in once.items() if state[1]}
        return Carry(states, loops, attention.attn, prefix, (2 * loops - 1) * layers, vllm_config) if states else None

    def forward(self, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Return the normed final hidden states [T, d] of tokens with embeddings [T, d] at positions [T]."""
        leave_piecewise_graphs()
        if self.rows is None:
            return self._loop_by_loop(positions, embeds)
        metadata = self.carry.metadata
        if metadata is None:
            # Dry run: warm up both ways. A decode step has at most as many tokens as a batch has requests.
            tokens = min(len(embeds), self.most_requests)
            self._decode(positions[:tokens].contiguous(), embeds[:tokens].contiguous())
        elif metadata.max_query_len == 1:
            return self._decode(positions, embeds)
        return self._loop_by_loop(positions, embeds)

    def _decode(self, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Run all loops at once, with one token per request."""
        starts = None
        if len(self.looped) < len(self.layers):
            starts = torch.arange(len(embeds), device=embeds.device)  # each row is the first of its request
        embeds = self._once(self.prelude, PRELUDE_KEYS, positions, embeds, starts)
        carried = self._carried(HIDDEN, slice(None), embeds, len(embeds))
        inputs = torch.cat([embeds[None], self.loop_input(embeds, carried)])
        taken = self._keys(KEYS, slice(None), embeds, len(embeds))
        adapters = nullcontext() if self.adapters is None else self.adapters.over_rows()
        with adapters, self._padding_of_rows(len(embeds)):
            states, last, keys = self.rows(positions, inputs, taken)
        self._hand_on(HIDDEN, states, slice(None))
        self._hand_on(KEYS, keys, slice(None))
        return self._once(self.coda, CODA_KEYS, positions, last, starts)

    def _padding_of_rows(self, tokens: int) -> AbstractContextManager:
        # Only experts read it.
        return nullcontext() if self.config.num_experts is None else padding_of_rows(self.settings.loop_count, tokens)

    def _loop_by_loop(self, positions: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        requests = min(len(embeds), self.most_requests)  # at most
        starts = None if self.carry is None else self._starts(requests, embeds)
        embeds = self._once(self.prelude, PRELUDE_KEYS, positions, embeds, starts)
        hidden_states, first_keys = embeds.clone(), None  # layers may overwrite it; later loops read embeds again
        for loop, run in enumerate(self.passes):
            which = slice(loop, loop + 1)
            if loop:
                hidden_states = self._next_input(embeds, hidden_states, starts, slice(loop - 1, loop))
            hidden_states, kept = self._run(run, KEYS, which, positions, hidden_states, starts, first_keys)
            first_keys = kept if loop == 0 else first_keys
        return self._once(self.coda, CODA_KEYS, positions, hidden_states, starts)

    def _once(
        self, run: nn.Module | None, kind: str, positions: torch.Tensor, hidden_states: torch.Tensor, starts
    ) -> torch.Tensor:
        """Apply the prelude or coda to hidden_states [T, d]; return them unchanged if there is none."""
        if run is None:
            return hidden_states
        return self._run(run, kind, slice(0, 1), positions, hidden_states.clone(), starts, None)[0]

    def _run(
        self,
        run: nn.Module,
        kind: str,
        which: slice,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        starts: torch.Tensor | None,
        first_keys: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one pass, whose keys shift by this kind of carried state; return its output and the keys it keeps."""
        carried = None if starts is None else self._keys(kind, which, hidden_states, len(starts))
        carried = None if carried is None else carried[0]
        hidden_states, keys, kept = run(positions, hidden_states, carried, starts, first_keys)
        self._hand_on(kind, None if keys is None else keys[None], which)
        return hidden_states, kept

    def _next_input(
        self, embeds: torch.Tensor, hidden_states: torch.Tensor, starts: torch.Tensor | None, which: slice
    ) -> torch.Tensor:
        """Return the next loop's input [T, d] from h(l) [T, d]; with cross-loop parallelism, also carry h(l)."""
        if not self.config.cross_loop_parallel:
            return hidden_states if self.loop_input is None else self.loop_input(embeds, hidden_states)
        # Store all tokens first: another request may compute this one's prefix in the same step.
        self._hand_on(HIDDEN, hidden_states[None], which)
        carried = self._carried(HIDDEN, which, embeds, len(starts))[0]
        return self.loop_input(embeds, previous_rows(hidden_states, starts, carried))

    def _starts(self, requests: int, embeds: torch.Tensor) -> torch.Tensor:
        """Return the first row of each request, counted from 0; T for requests that do not exist."""
        starts = torch.full((requests,), len(embeds), device=embeds.device)
        if self.carry.metadata is None:
            starts[0] = 0
        else:
            known = self.carry.metadata.query_start_loc[:-1]
            starts[: len(known)] = known
        return starts

    def _carried(self, kind: str, which: slice, like: torch.Tensor, rows: int) -> torch.Tensor:
        """Return a kind of carried state [loops, rows, width]; zero in a dry run and beyond the step's requests."""
        count, width = self.carry.states[kind]
        carried = like.new_zeros(len(range(count)[which]), rows, width)
        if self.carry.metadata is not None:
            found = self.carry.read(kind, which)
            carried[:, : found.shape[1]] = found
        return carried

    def _keys(self, kind: str, which: slice, like: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Return what these loops' shifted keys use, [loops, rows, layers, P]; None if keys are not shifted."""
        if not range(self.carry.states.get(kind, (0, 0))[0])[which]:
            return None
        return self._carried(kind, which, like, rows).unflatten(-1, (-1, self.layers[0].self_attn.key_shift.width))

    def _hand_on(self, kind: str, states: torch.Tensor | None, which: slice) -> None:
        """Store states [loops, T, ...] in the carry, for the tokens after these."""
        if states is not None and self.carry.metadata is not None:
            self.carry.write(kind, states.flatten(2), which)


class PLTForCausalLM(nn.Module, SupportsLoRA, SupportsQuant):
    """PLT with a language-model head; reads the tensor names of plt_megatron's exports and of LoopCoder-v2."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            # Experts are mapped by their own loader.
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
            ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.model = PLTModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.folder = vllm_config.model_config.model
        self.read = self._read_tensors(vllm_config)
        settings = self.model.settings
        logger.info_once(f"PLT: {settings.loop_count} of {config.loop_count} loops, {settings.loop_mode}")
        slices = 0 if self.model.carry is None else len(self.model.carry.slices)
        say_what_chunks_cost(config, settings.loop_count, slices, vllm_config)

    def _read_tensors(self, vllm_config: VllmConfig) -> ReadTensors:
        # An attention layer's parameters are KV cache scales, which checkpoints need not have.
        caches = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, Attention))
        return ReadTensors(
            ((name, param) for name, param in self.named_parameters() if not name.startswith(caches)),
            {part: whole for part, (whole, _) in self.hf_to_vllm_mapper.orig_to_new_stacked.items()},
            self.config.num_experts or 0,
            all_experts=not vllm_config.parallel_config.enable_ep_weight_filter,
            quantized=vllm_config.quant_config is not None,
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(positions, embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        ignored = []
        if self.config.tie_word_embeddings:
            ignored.append("lm_head.")
        if self.model.settings.loop_count == 1:  # one loop needs no gates and loop inputs
            later = (".plt_gate.", ".loop_input.")
            weights = ((name, tensor) for name, tensor in weights if not any(part in name for part in later))
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=ignored)
        return loader.load_weights(self.read.recorded(weights), mapper=self.hf_to_vllm_mapper)

    def process_weights_after_loading(self) -> None:
        """Check that all tensors were read. vLLM calls this after loading; a later `load_weights` may be partial."""
        self.read.check(self.folder)
