"""A checkpoint loaded into another layout, and read without any: the same numbers."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import read_progress
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed.cases import ENDS, SPAN, Layout
from tests.distributed.params import slow

KINDS: dict[str, dict[str, Any]] = {
    "PLT": jobs.SCALES,
    "four layers": {**jobs.SCALES, "num_layers": 4},
    "one key/value head": {**jobs.SCALES, "num_query_groups": 1},
    "layers that run once": {**jobs.SCALES, **SPAN},
    "experts": jobs.EXPERTS,
    "Muon": {"optimizer": "muon", "num_layers": 4},
    "SGD": {"optimizer": "sgd"},
}


def config_of(kind: str, words: str) -> Any:
    """The run of a kind of model in a layout, as in "TP2 DP2"."""
    layout, overlap = Layout.of(words), "optimizer" not in KINDS[kind]
    settings = {**layout.settings, "overlap_grad_reduce": overlap and layout.dp > 1}
    return jobs.run_config(settings, **KINDS[kind])


@pytest.fixture(scope="module")
def saved(run_distributed, tmp_path_factory) -> Callable[[str, str], tuple[dict[str, Any], Path]]:
    """Six steps of a kind of model in a layout, saved after the third: what they gave, and the folder."""

    @functools.cache
    def saved(kind: str, words: str) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("saved")
        ranks = Layout.of(words).world_size
        return run_distributed(jobs.train_and_save, ranks, folder, config_of(kind, words), then=3), folder

    return saved


@pytest.mark.parametrize(
    ("kind", "start", "end"),
    [
        *(("PLT", "TP2 SP PP2", end) for end in ("TP1", "TP2 DP2", "CP2 DP2")),
        ("four layers", "PP2", "PP4"),
        slow("PLT", "TP2 SP PP2", "DP4"),
        *(slow("one key/value head", start, "TP2") for start in ("TP1", "TP4")),
        *(slow("one key/value head", "TP2", end) for end in ("TP1", "TP4")),
        ("experts", "DP2 EP2", "TP1"),
        *(slow("experts", "TP1", end) for end in ("TP2 SP EP2", "PP2 DP2 EP2", "DP4 EP4")),
        ("layers that run once", "TP1", "TP2 SP"),
        slow("layers that run once", "TP1", "CP2 DP2"),
        *(slow("Muon", "TP2 SP DP2", end) for end in ("PP2", "DP4", "TP1", "TP2 DP2", "PP4")),
        slow("SGD", "TP2 SP PP2", "DP2"),
    ],
)
def test_a_run_goes_on_in_another_layout(run_distributed, saved, kind, start, end):
    stayed, folder = saved(kind, start)
    moved = run_distributed(jobs.load_and_train, Layout.of(end).world_size, folder, config_of(kind, end))
    np.testing.assert_allclose(moved["after"], stayed["after"], rtol=1e-5)
    assert not any("in the checkpoint" in line for line in moved["log"])
    momentum = {"Muon": {"optimizer.muon_momentum": 0.95}, "SGD": {"optimizer.sgd_momentum": 0.9}}
    assert moved["progress"]["schedule"].items() >= momentum.get(kind, {}).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, 4),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 3}, 4),
        ({"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 2}, 5),
        ({"pipeline_model_parallel_size": 4, **ENDS}, 2),
    ],
    ids=["3 + 1", "1 + 3", "2 + 1 + 1 + 1", "0 + 1 + 1 + 0"],
)
def test_uneven_stages_are_written_as_one_process_writes(run_distributed, tmp_path, layout, layers):
    """They go on bit for bit where they are, and with the same numbers to and from one process."""
    one, uneven = (jobs.run_config(parallel, num_layers=layers, **jobs.SCALES) for parallel in ({}, layout))
    stages = layout["pipeline_model_parallel_size"]
    alone = run_distributed(jobs.train_and_save, 1, tmp_path / "one", one, then=3)
    stayed = run_distributed(jobs.train_and_save, stages, tmp_path / "uneven", uneven, then=3)
    assert run_distributed(jobs.load_and_train, stages, tmp_path / "uneven", uneven)["after"] == stayed["after"]
    for ranks, start, config in ((1, "uneven", one), (stages, "one", uneven)):
        moved = run_distributed(jobs.load_and_train, ranks, tmp_path / start, config)
        np.testing.assert_allclose(moved["after"], alone["after"], rtol=1e-5)
    assert jobs.stored_tensors(tmp_path / "uneven").keys() == jobs.stored_tensors(tmp_path / "one").keys()


def test_replicas_share_the_writing(run_distributed, saved, tmp_path):
    """With PP2 x DP2 and tied embeddings every rank writes something, and nothing is written twice."""
    stayed, alone = saved("PLT", "TP1")
    run_distributed(jobs.train_and_save, 4, tmp_path, config_of("PLT", "PP2 DP2"))
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("step_*/*.distcp")}
    assert sorted(sizes) == [f"__{rank}_0.distcp" for rank in range(4)]
    assert sum(sizes.values()) < 1.3 * sum(path.stat().st_size for path in alone.glob("step_*/*.distcp"))
    moved = run_distributed(jobs.load_and_train, 1, tmp_path, config_of("PLT", "TP1"))
    np.testing.assert_allclose(moved["after"], stayed["after"], rtol=1e-5)


def test_every_tensor_of_the_optimizer_is_the_single_process_one(saved):
    """Main parameters and moments agree to rounding, whichever bucket held them, and padding does not matter."""
    ours, theirs = (jobs.stored_tensors(saved("PLT", words)[1]) for words in ("TP2 SP PP2", "TP1"))
    assert ours.keys() == theirs.keys() and sum("exp_avg_sq" in key for key in ours) >= 10
    for key, tensor in ours.items():
        other = theirs[key]
        if tensor.shape != other.shape:  # the vocabulary, padded for each layout
            assert "embedding" in key
            tensor, other = tensor[: jobs.VOCAB], other[: jobs.VOCAB]
        # A moment is a sum over few steps: to rounding of its own scale.
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=key)


def test_read_weights_needs_no_megatron(saved):
    program = (
        "import sys; from plt_megatron.train.checkpoint.reading import read_weights\n"
        "names = [name for name, _ in read_weights(sys.argv[1])]\n"
        "print(len(names), any(name.startswith('megatron') for name in sys.modules))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(saved("PLT", "TP2 SP PP2")[1])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=jobs.ROOT, timeout=120)
    assert done.stdout.split() == ["19", "False"], done.stderr


def test_read_weights_needs_no_processes_and_gives_whole_tensors(saved):
    from plt_megatron.train.checkpoint.reading import read_weights

    folder, alone = (saved("PLT", words)[1] for words in ("TP2 SP PP2", "TP1"))
    progress = read_progress(folder)
    assert progress["step"] == 3 and progress["layout"]["pipeline_model_parallel_size"] == 2
    assert progress["config"]["model"]["hidden_size"] == 40 and progress["vocab_size"] == jobs.VOCAB
    ours, theirs = dict(read_weights(folder)), dict(read_weights(alone))
    assert not torch.distributed.is_initialized()
    assert ours.keys() == theirs.keys()
    assert ours["embedding.word_embeddings.weight"].shape == (jobs.VOCAB, 40)
    assert ours["decoder.layers.1.mlp.linear_fc1.weight"].shape == (2 * 56, 40)
    assert "decoder.layers.0.self_attention.core_attention.plt_gate.bias" in ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_experts_weights_are_read_one_by_one(saved):
    from plt_megatron.train.checkpoint.reading import Weights, read_weights

    (stayed, alone), (_, shared_out) = (saved("experts", words) for words in ("TP1", "DP2 EP2"))
    weights, others = dict(read_weights(alone)), dict(read_weights(shared_out))
    assert weights.keys() == others.keys()
    names = [name for name in weights if ".mlp.experts." in name]
    assert len(names) == 4 * 2 and "decoder.layers.0.mlp.linear_fc1.weight" in weights
    assert weights["decoder.layers.1.mlp.experts.2.linear_fc1.weight"].shape == (2 * 24, 40)
    bias = weights["decoder.layers.1.mlp.router.expert_bias"]
    assert bias.shape == (4,) and 0.01 < bias.abs().max() < 0.07, "three steps of 0.02"
    main = Weights(stayed["path"], "main weights")
    assert set(main.names) == weights.keys(), "biases, which no optimizer has, go with any"
    assert torch.equal(main.read("decoder.layers.1.mlp.router.expert_bias"), bias)
    for layer in ("2.", ""):  # beyond the last one, and all of them
        with pytest.raises(KeyError):
            main.read(f"decoder.layers.{layer}self_attention.linear_qkv.weight")
    for name in names + [name for name in weights if name.endswith("expert_bias")]:
        assert (weights[name] - others[name]).abs().max() < 1e-5 * weights[name].abs().max(), name
