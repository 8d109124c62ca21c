"""Exports of checkpoints that several layouts saved compute what the training model computed in that layout.

Compared are the losses of single tokens, as the layout's own pipeline computed them, and every weight, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.checkpoints import save_checkpoint
from tests.distributed.cases import LOOPCODER, VOCAB_SIZE, Case, Layout
from tests.distributed.params import slow

# A norm of an output that starts small would amplify rounding: hence its epsilon.
POST_NORM = {"norm_placement": "post", "qk_layernorm": True, "layernorm_epsilon": 1e-2}


CASES = {
    "PLT-3, paper's norms": Case(3, model={"qk_layernorm": True, "norm_placement": "pre_ffn_output"}),
    "LoopCoder-v2": Case(2, model=LOOPCODER),
    "biases, one key/value head": Case(2, model={"qkv_bias": True, "num_query_groups": 1}),
    "post-norm": Case(2, model=POST_NORM),
}


def train_save_and_evaluate(layout: Layout, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Train each case a step, save it as `folder/<number>` and evaluate. On rank 0: tokens, labels and losses, all
    [rows, tokens] in one order, and the whole weights by name."""
    from plt_megatron.runtime.process_groups import init_process_groups
    from tests.distributed import parity

    init_process_groups(parity._parallel(layout, Case()))
    return [_train_save_and_evaluate(layout, case, folder / str(number)) for number, case in enumerate(cases)]


def _train_save_and_evaluate(layout: Layout, case: Case, folder: Path) -> dict[str, Any]:
    from plt_megatron.train import megatron_engine as engine_module
    from tests.distributed import parity

    with parity._randomized(False):
        engine = engine_module.MegatronEngine(parity._config(layout, case), VOCAB_SIZE)
    engine.train_step(parity._batches(0, layout, case))
    save_checkpoint(engine, folder, {"step": 1})
    batches = parity._batches(1, layout, case)
    losses = _record_losses(engine_module, lambda: engine.evaluate(batches, case.loops))
    # The last stage's ranks have losses, of their data-parallel share of the batch.
    own = [(batch.tokens.numpy(), batch.labels.numpy(), loss) for batch, loss in zip(batches, losses, strict=False)]
    rows = [row for rank in _everyones(own) for row in rank]
    names = ("tokens", "labels", "losses")
    outcome = {name: np.concatenate(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}
    weights = parity._gather(engine.stage)
    _check_shards(engine.stage, engine.config.model, folder)
    return {**outcome, "weights": weights}


def _check_shards(stage: Any, model: Any, checkpoint: Path) -> None:
    """Whole weights, cut by the table of rules, are this rank's again."""
    import torch

    from plt_megatron.hf.conversion import mappings_for
    from plt_megatron.hf.verification import fill_model
    from plt_megatron.train.checkpoint.reading import read_weights

    before = {name: parameter.detach().clone() for name, parameter in stage.named_parameters()}
    for parameter in stage.parameters():
        parameter.data.fill_(9.0)
    fill_model(stage, read_weights(checkpoint), mappings_for(model, VOCAB_SIZE))
    for name, parameter in stage.named_parameters():
        if "word_embeddings" not in name and "output_layer" not in name:  # padding is not kept
            assert torch.equal(parameter, before[name]), name


def _everyones(value: Any) -> list[Any]:
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _record_losses(engine_module: Any, run: Any) -> list[np.ndarray]:
    """Losses of tokens, microbatch by microbatch, that this rank's last stage saw while `run` ran."""
    recorded = []
    stock = engine_module.masked_loss

    def recording(loss_mask: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        recorded.append(output.detach().float().numpy().copy())
        return stock(loss_mask, output, *args, **kwargs)

    with mock.patch.object(engine_module, "masked_loss", recording):
        run()
    return recorded


QUICK = ("PLT-3, paper's norms", "LoopCoder-v2")


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        pytest.param("TP2 SP PP2", QUICK, id="two models"),
        *(slow(layout, tuple(CASES), id=layout) for layout in ("TP2 SP PP2", "DP2", "TP2 SP", "PP2")),
    ],
)
def test_exports_are_the_training_model_of_every_layout(run_distributed, tmp_path, layout, names):
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from plt_megatron.hf.exporting import ExportOptions, export
    from plt_megatron.hf.sources import open_source

    layout, cases = Layout.of(layout), [CASES[name] for name in names]
    outcomes = run_distributed(
        train_save_and_evaluate, layout.world_size, layout, cases, tmp_path / "runs", timeout_s=240
    )
    for number, outcome in enumerate(outcomes):
        run, out = tmp_path / "runs" / str(number), tmp_path / f"out{number}"
        for name, tensor in open_source(run).weights():
            assert np.array_equal(tensor.numpy(), outcome["weights"][name]), name
        result = export(ExportOptions(run, out), say=lambda line: None)
        assert result.checkpoint.name == "step_00000001"
        model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(outcome["tokens"]), use_cache=False).logits
        assert logits.shape[-1] == VOCAB_SIZE and logits.std() > 0.1
        losses = F.cross_entropy(logits.transpose(1, 2), torch.from_numpy(outcome["labels"]), reduction="none")
        assert np.abs(losses.numpy() - outcome["losses"]).max() < 2e-5, names[number]
