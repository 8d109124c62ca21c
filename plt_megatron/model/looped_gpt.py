"""The looped GPT: one stack of layers, run `loop_count` times (paper section 3).

With E the token embeddings and f the shared stack,

    h^(1) = f(E),    h^(l) = f(E + shift(h^(l-1)))    for l = 2 .. L,    logits = Head(norm(h^(L))).

With `model.loop_span`, f is only the layers of that range. The layers before it are the prelude, whose output replaces
E; those after it are the coda: logits = Head(norm(coda(h^(L)))). With `model.loop_order: layer` each layer of f runs
all its loops before the next one.

`LoopedGPT` is one pipeline stage of this model: its share of the layers, held once, and the embedding or the head at
the ends. `run_loop` runs one loop through the stage; `forward` chains all loops if one stage holds everything.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.model.context_parallel import SequenceShard
from plt_megatron.model.layer_specs import kit_of, layer_specs
from plt_megatron.model.loop_context import Documents, LoopContext, LoopStatistics
from plt_megatron.model.loop_input import LoopInput, shift
from plt_megatron.model.loss import attach_loss, sum_of_losses
from plt_megatron.model.parameters import tensors_of
from plt_megatron.model.rotary import RotaryAngles
from plt_megatron.model.transformer_config import PLTTransformerConfig
from plt_megatron.model.z_loss import HeadZLoss


@dataclass
class MicroBatch:
    """One microbatch's inputs, all [b, s]. Under context parallelism the model gets what `shard_for_cp` returns.

    Attributes:
        tokens: int64 token ids.
        position_ids: int64, read with `document_starts`; None: 0, 1, 2 .. from the start of each row or document.
        labels: int64, or None for logits instead of losses.
        loss_mask: float, 1 where a token counts in the loss; None: everywhere.
        document_starts: bool, True at each packed document's first token; None: a row is one text.
        document_lengths: the documents' lengths (`loop_context.document_lengths`); None: computed when needed.
        sample_ids: int64 [b] on the CPU, numbers of the samples in the data set, for reports.
        statistics: collects the loops' statistics, or None.
    """

    tokens: Tensor
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    document_starts: Tensor | None = None
    document_lengths: list[int] | None = None
    sample_ids: Tensor | None = None
    statistics: LoopStatistics | None = None

    def context(self, loop_count: int) -> LoopContext:
        """Create a fresh context for this microbatch's loops."""
        starts = self.document_starts
        documents = None if starts is None else Documents(starts, self.document_lengths)
        return LoopContext(loop_count=loop_count, documents=documents, statistics=self.statistics)

    def shard_for_cp(self, rows: SequenceShard) -> MicroBatch:
        """Return a context-parallel rank's part: its own rows, [b, s / CP], but all document starts."""
        if rows.size == 1:
            return self

        def own(whole: Tensor | None) -> Tensor | None:
            return None if whole is None else rows.select(whole, 1)

        return replace(
            self,
            tokens=rows.select(self.tokens, 1),
            position_ids=own(self.position_ids),
            labels=own(self.labels),
            loss_mask=own(self.loss_mask),
        )


def _part_of(block: TransformerBlock, layers: range) -> TransformerBlock:
    """Return the layers of `block` with these indices as a block, which runs them as megatron-core does, with its
    recomputation and precision contexts: a view, which owns no parameters.

    Created for each pass, so that it has the training mode of `block`; recomputation, which runs it again later, keeps
    a reference to it.
    """
    part = copy.copy(block)
    part._modules = {**block._modules, "layers": nn.ModuleList(block.layers[layers.start : layers.stop])}
    part.num_layers_per_pipeline_rank = len(layers)
    return part


class LoopedGPT(LanguageModule):
    """One pipeline stage of a (Parallel) Loop Transformer.

    Args:
        config: the layers' configuration; `config.plt` says how the loops are joined.
        vocab_size: the tokenizer's vocabulary size.
        padded_vocab_size: rows of the embedding table, as the tensor-parallel layout requires. Padding never enters the
            softmax, so every layout computes the same loss.
        max_sequence_length: tokens per row.
        pre_process: whether this stage holds the embedding.
        post_process: whether this stage holds the final norm and the output layer.

    Attributes:
        loop_loss_weights: weights of the training losses on the outputs of loops 1, 2, ...; empty at construction.
        loss_gradient: gradient that the engine's backward gives each token's loss; scales earlier loops' losses, which
            do not pass through the engine.
        z_loss: adds to the gradient of the last loop's losses in training; None at construction.
    """

    def __init__(
        self,
        config: PLTTransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        *,
        padded_vocab_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.plt = config.plt
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size or vocab_size
        self.pre_process = pre_process
        self.post_process = post_process
        self.loop_loss_weights: tuple[float, ...] = ()
        self.loss_gradient = 1.0
        self.z_loss: HeadZLoss | None = None
        self.share_embeddings_and_output_weights = self.plt.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        self.context_rows = SequenceShard.of(self.pg_collection, sequence_parallel=False)
        self.hidden_rows = SequenceShard.of(self.pg_collection, config.sequence_parallel)
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=self.padded_vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
            self.loop_input = LoopInput(config)
        self.rotary_angles = RotaryAngles(config, self.pg_collection.cp)
        # The final norm belongs to the model, not the block: it closes the last loop only, or every loop.
        self.decoder = TransformerBlock(
            config=config,
            spec=layer_specs(self.plt, config.backend, self._own_layers()),
            post_layer_norm=False,
            pre_process=True,
            post_process=post_process,
            pg_collection=self.pg_collection,
        )
        if post_process:
            self._build_head(config)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _own_layers(self) -> range:
        """Return this stage's layers, counted from 0 over the whole model."""
        config, rank = self.config, self.pg_collection.pp.rank()
        first = get_transformer_layer_offset(config, pp_rank=rank)
        return range(first, first + get_num_layers_to_build(config, pp_rank=rank))

    def _build_head(self, config: PLTTransformerConfig) -> None:
        self.final_layernorm = kit_of(config.backend).norm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        # Transformer Engine has no such layer; megatron-core's would accumulate its gradient with an apex kernel.
        head_config = copy.copy(config)
        head_config.gradient_accumulation_fusion = False
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocab_size,
            config=head_config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=self.pg_collection.tp,
        )

    def forward(self, batch: MicroBatch, loop_count: int | None = None) -> Tensor:
        """Run all loops; this stage must be the whole model.

        Args:
            loop_count: number of loops, if other than the model was built with (for evaluation).

        Returns:
            Per-token losses, float32 [b, s / CP], or logits [b, s / CP, vocab / TP] if `batch` has no labels.
        """
        assert self.pre_process and self.post_process, "a pipeline stage runs one loop at a time"
        loop_count = loop_count or self.plt.loop_count
        context = batch.context(loop_count)
        embeddings = self.embed(batch, context)
        if self.plt.loop_order == "layer":
            return self._run_layer_by_layer(batch, context, embeddings)
        hidden_states: Tensor | None = None
        for loop in range(1, loop_count + 1):
            hidden_states = self.run_loop(batch, context.at_loop(loop), hidden_states, embeddings)
        assert hidden_states is not None
        return hidden_states

    def run_loop(
        self,
        batch: MicroBatch,
        context: LoopContext,
        hidden_states: Tensor | None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Run one loop through this stage.

        Args:
            context: the loop's context; all loops of a microbatch share the first loop's K and V.
            hidden_states: [s / CP (/ TP), b, h], the stage's input: the previous stage's output of this loop or, on the
                first stage, the last stage's output of the previous loop. None in the first stage's first loop.
            embeddings: output of `embed`, if computed for an earlier loop.

        Returns:
            Hidden states for the next stage or, from the last stage's last loop, what `forward` returns.
        """
        if self.pre_process:
            hidden_states = self._loop_input(batch, context, hidden_states, embeddings)
        assert hidden_states is not None
        looped = derived.looped_layers(self.plt)
        hidden_states = self._run_layers(looped, hidden_states, batch, context)
        if not self.post_process:
            return hidden_states
        to_coda = context.is_last_loop and looped.stop < self.plt.num_layers  # the coda reads h^(L) without the norm
        is_normed = self.plt.loop_norm == "final" and (not to_coda or context.statistics is not None)
        normed = self.final_layernorm(hidden_states) if is_normed else hidden_states
        if context.statistics is not None:
            context.statistics.add_hidden(context.loop, normed)
        if not context.is_last_loop:
            return self._with_loop_loss(batch, context.loop, hidden_states, normed)
        if self.plt.loop_norm == "final" and not to_coda:
            return self._output(normed, batch)
        return self._close(hidden_states, batch, context)

    def _run_layer_by_layer(self, batch: MicroBatch, context: LoopContext, hidden_states: Tensor) -> Tensor:
        """Run all loops of each layer before the next layer's. Statistics of hidden states are those of the last looped
        layer."""
        looped = derived.looped_layers(self.plt)
        for layer in looped:
            counted = context.statistics if layer == looped[-1] else None
            if counted is not None:
                counted.add_hidden(0, hidden_states)
            for loop in range(1, context.loop_count + 1):
                own = range(layer, layer + 1)
                hidden_states = self._run_layers(own, hidden_states, batch, context.at_loop(loop))
                if counted is not None:
                    counted.add_hidden(loop, hidden_states)
        return self._close(hidden_states, batch, context)

    def _close(self, hidden_states: Tensor, batch: MicroBatch, context: LoopContext) -> Tensor:
        """Run h^(L) through the coda, the final norm and the head, and return what `forward` does."""
        coda = range(derived.looped_layers(self.plt).stop, self.plt.num_layers)
        if coda:
            hidden_states = self._run_layers(coda, hidden_states, batch, context.at_loop(1))
        return self._output(self.final_layernorm(hidden_states), batch)

    def _run_layers(self, layers: range, hidden_states: Tensor, batch: MicroBatch, context: LoopContext) -> Tensor:
        """Run some of the model's layers, [s / CP (/ TP), b, h] -> the same. A pipeline stage runs its share of all."""
        if not self.decoder.layers:
            hidden_states = hidden_states.clone()  # like megatron-core's empty blocks: not the stage's input itself
        whole = len(layers) == self.plt.num_layers
        return (self.decoder if whole else _part_of(self.decoder, layers))(
            hidden_states=hidden_states,
            attention_mask=None,
            rotary_pos_emb=self._rotary_embedding(batch, context),
            packed_seq_params=context,
        )

    def _with_loop_loss(self, batch: MicroBatch, loop: int, hidden_states: Tensor, normed: Tensor) -> Tensor:
        """Return what a loop other than the last passes on. In training, if the loop's loss has a weight, attach the
        loss on its output, taken through the final norm and the head."""
        weight = self.loop_loss_weights[loop - 1] if loop <= len(self.loop_loss_weights) else 0.0
        if weight == 0 or not self.training or batch.labels is None:
            return normed
        output = normed if self.plt.loop_norm == "final" else self.final_layernorm(hidden_states)
        loss_sum, _ = sum_of_losses(self._head(output, batch.labels), batch.loss_mask)
        return attach_loss(normed, self.loss_gradient * weight * loss_sum)

    def embed(self, batch: MicroBatch, context: LoopContext) -> Tensor:
        """Return the token embeddings E or, with a prelude, its output, [s / CP (/ TP), b, h]."""
        embeddings = self.embedding(input_ids=batch.tokens, position_ids=None)
        if self.training and not embeddings.requires_grad:
            # The table is frozen: a recomputed layer gets gradients only if its input requires one.
            embeddings.requires_grad_(torch.is_grad_enabled())
        prelude = range(derived.looped_layers(self.plt).start)
        return self._run_layers(prelude, embeddings, batch, context.at_loop(1)) if prelude else embeddings

    def _loop_input(
        self, batch: MicroBatch, context: LoopContext, hidden_states: Tensor | None, embeddings: Tensor | None
    ) -> Tensor:
        """Return the stack's input: E in the first loop, later E + shift(h) or, without cross-loop parallelism, h or
        E + h."""
        if context.loop > 1 and not derived.adds_embeddings(self.plt):
            assert hidden_states is not None
            return hidden_states
        if embeddings is None:
            embeddings = self.embed(batch, context)
        if context.loop == 1:
            if context.statistics is not None and self.post_process:
                context.statistics.add_hidden(0, embeddings)
            return embeddings
        assert hidden_states is not None
        if self.plt.cross_loop_parallel:
            starts = context.documents.starts if context.documents is not None else None
            hidden_states = shift(hidden_states, starts, self.hidden_rows)
        return self.loop_input(embeddings, hidden_states)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Same as megatron-core's, which stacks each kind of tensor over all layers, except that tensors of only some
        layers (gates, a dense FFN, experts) are saved under their layers' names."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if all(tensor.in_all_layers(self.plt) for tensor in tensors_of(self.plt) if tensor.per_layer):
            return state
        for index, layer in enumerate(self.decoder.layers):
            here, whole = (f"{prefix}decoder.layers.{number}." for number in (index, layer.layer_number - 1))
            own = layer.sharded_state_dict(here, (), metadata)
            own = {name: value for name, value in own.items() if not self._is_in_all_layers(name)}
            replace_prefix_for_sharding(own, here, whole)
            state |= own
        return state

    def _is_in_all_layers(self, name: str) -> bool:
        """Return whether every layer has this tensor or, for extra state, the weight it belongs to; an attention's
        extra state belongs to none."""
        weight = name.replace("._extra_state", ".weight")
        return all(tensor.in_all_layers(self.plt) for tensor in tensors_of(self.plt) if tensor.is_named(weight))

    def _rotary_embedding(self, batch: MicroBatch, context: LoopContext) -> Tensor:
        """Return RoPE angles, [s / CP, 1 or b, 1, head_dim], for each token's own index in every loop."""
        length = batch.tokens.shape[1] * self.context_rows.size
        if context.documents is None:
            return self.rotary_angles(length)
        angles = self.rotary_angles(length, whole=True)
        positions = batch.position_ids
        if positions is None:
            positions = self.context_rows.select(context.documents.position_ids, 1)
        return angles[:, 0, 0][positions.transpose(0, 1)].unsqueeze(2)

    def _output(self, hidden_states: Tensor, batch: MicroBatch) -> Tensor:
        """Compute what `forward` returns from the last loop's normed hidden states."""
        if self.z_loss is None or not self.training or batch.labels is None:
            return self._head(hidden_states, batch.labels)
        logits, cross_entropy = self._logits(hidden_states), self.compute_language_model_loss
        return self.z_loss(logits, batch.labels, batch.loss_mask, cross_entropy)

    def _head(self, hidden_states: Tensor, labels: Tensor | None) -> Tensor:
        logits = self._logits(hidden_states)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits [s / CP, b, vocab / TP], -inf for the table's padding."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        own_rows = logits.shape[-1]
        real_rows = self.vocab_size - self.pg_collection.tp.rank() * own_rows
        if real_rows < own_rows:
            logits[..., max(real_rows, 0) :] = float("-inf")
        return logits
