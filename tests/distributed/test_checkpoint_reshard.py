"""A checkpoint loaded into another layout, and read without any: the same numbers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch

from tests.distributed import checkpoint_jobs as jobs

run_config = partial(jobs.run_config, loop_norm="rms", learned_hidden_scale="channel")
TP2_PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def reference(run_distributed, tmp_path_factory):
    """Six steps of one process, saved after the third."""
    directory = tmp_path_factory.mktemp("one")
    outcome = run_distributed(jobs.train_and_save, 1, directory, run_config(), then=3)
    return outcome, directory


@pytest.fixture(scope="module")
def saved(run_distributed, tmp_path_factory):
    """Three steps at TP2 x PP2 with tied embeddings, saved."""
    directory = tmp_path_factory.mktemp("tp2pp2")
    run_distributed(jobs.train_and_save, 4, directory, run_config(TP2_PP2))
    return directory


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        pytest.param({}, 1, id="1 process"),
        pytest.param(PP4, 4, id="PP4"),
        pytest.param({**PP2, "num_layers_in_last_pipeline_stage": 3}, 2, id="PP2 of 1 + 3", marks=pytest.mark.slow),
        pytest.param({"overlap_grad_reduce": True}, 4, id="DP4", marks=pytest.mark.slow),
        pytest.param(TP2, 4, id="TP2xDP2"),
        pytest.param({"context_parallel_size": 2, "overlap_grad_reduce": True}, 4, id="CP2xDP2"),
    ],
)
def test_reshard_goes_on_with_the_same_numbers(run_distributed, reference, saved, layout, world_size):
    resumed = run_distributed(jobs.load_and_train, world_size, saved, run_config(layout))
    _assert_same_numbers(resumed["after"], reference[0]["after"])
    assert not any("in the checkpoint" in line for line in resumed["log"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({**PP2, "num_layers_in_first_pipeline_stage": 3}, 4),
        ({**PP4, "num_layers_in_first_pipeline_stage": 2}, 5),
        (
            {**PP4, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
            2,
        ),
    ],
    ids=["3 + 1", "2 + 1 + 1 + 1", "0 + 1 + 1 + 0"],
)
def test_uneven_stages_are_written_as_one_process_writes(run_distributed, tmp_path, layout, layers):
    """And go on bit for bit where they are, or in one process with the same numbers."""
    alone = run_distributed(jobs.train_and_save, 1, tmp_path / "one", run_config(num_layers=layers), then=2)
    config = run_config(layout, num_layers=layers)
    world_size = layout["pipeline_model_parallel_size"]
    stayed = run_distributed(jobs.train_and_save, world_size, tmp_path / "uneven", config, then=2)
    resumed = run_distributed(jobs.load_and_train, world_size, tmp_path / "uneven", config)
    assert resumed["after"][:2] == stayed["after"]
    moved = run_distributed(jobs.load_and_train, 1, tmp_path / "uneven", run_config(num_layers=layers))
    _assert_same_numbers(moved["after"][:2], alone["after"])
    assert _tensors(tmp_path / "uneven").keys() == _tensors(tmp_path / "one").keys()


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_ranks_that_share_a_key_value_head_read_each_others(run_distributed, tmp_path, there, here):
    one_head = partial(run_config, num_query_groups=1)
    alone = run_distributed(jobs.train_and_save, 1, tmp_path / "one", one_head(), then=3)
    layouts = ({"tensor_model_parallel_size": ranks} for ranks in (there, here))
    saving, reading = (one_head(layout) for layout in layouts)
    run_distributed(jobs.train_and_save, there, tmp_path / "there", saving)
    resumed = run_distributed(jobs.load_and_train, here, tmp_path / "there", reading)
    _assert_same_numbers(resumed["after"], alone["after"])


def test_replicas_share_the_writing(run_distributed, reference, tmp_path):
    """Of PP2 x DP2 with tied embeddings, every rank writes something, and nothing is written twice."""
    run_distributed(jobs.train_and_save, 4, tmp_path, run_config({**PP2, "overlap_grad_reduce": True}))
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("step_*/*.distcp")}
    assert sorted(sizes) == [f"__{rank}_0.distcp" for rank in range(4)]
    single = sum(path.stat().st_size for path in reference[1].glob("step_*/*.distcp"))
    assert sum(sizes.values()) < 1.2 * single
    resumed = run_distributed(jobs.load_and_train, 1, tmp_path, run_config())
    _assert_same_numbers(resumed["after"], reference[0]["after"])


def _assert_same_numbers(ours, expected):
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_every_tensor_of_the_optimizer_is_the_single_process_one(reference, saved):
    """Main parameters and moments agree to rounding, whichever bucket held them, and padding does not matter."""
    ours, theirs = (_tensors(directory) for directory in (saved, reference[1]))
    assert ours.keys() == theirs.keys() and sum("exp_avg_sq" in key for key in ours) >= 10
    for key, tensor in ours.items():
        other = theirs[key]
        if tensor.shape != other.shape:  # the vocabulary, padded for each layout
            assert "embedding" in key
            tensor, other = tensor[: jobs.VOCAB], other[: jobs.VOCAB]
        # A moment is a sum over few steps: to rounding of its own scale.
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=key)


def _tensors(directory):
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from plt_megatron.run_folder.checkpoints import latest_checkpoint

    path = latest_checkpoint(directory)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def test_read_weights_needs_no_megatron(saved):
    program = (
        "import sys; from plt_megatron.train.checkpoint import read_weights\n"
        "names = [name for name, _ in read_weights(sys.argv[1])]\n"
        "print(len(names), any(name.startswith('megatron') for name in sys.modules))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=jobs.ROOT, timeout=120)
    assert done.stdout.split() == ["35", "False"], done.stderr


def test_read_weights_needs_no_processes_and_gives_whole_tensors(reference, saved):
    from plt_megatron.run_folder.checkpoints import read_progress
    from plt_megatron.train.checkpoint import read_weights

    progress = read_progress(saved)
    assert progress["step"] == 3 and progress["layout"]["pipeline_model_parallel_size"] == 2
    assert progress["config"]["model"]["hidden_size"] == 40 and progress["vocab_size"] == jobs.VOCAB
    ours, theirs = dict(read_weights(saved)), dict(read_weights(reference[1]))
    assert not torch.distributed.is_initialized()
    assert ours.keys() == theirs.keys()
    assert ours["embedding.word_embeddings.weight"].shape == (jobs.VOCAB, 40)
    assert ours["decoder.layers.3.mlp.linear_fc1.weight"].shape == (2 * 56, 40)
    assert "decoder.layers.0.self_attention.core_attention.plt_gate.bias" in ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-6, msg=name)
