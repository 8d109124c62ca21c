"""How a checkpoint may differ from the engine that loads it, and how not."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from plt_megatron.config.schema import RateFactors
from plt_megatron.errors import UserError
from plt_megatron.hf.sources import open_source
from plt_megatron.run_folder.checkpoints import doubt
from tests.checkpoints import read_progress, save_checkpoint
from tests.distributed import checkpoint_jobs as jobs

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
UNTIED = {"share_embeddings_and_output_weights": False}


@pytest.fixture(scope="module")
def two_loops(run_distributed, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    run_distributed(jobs.train_and_save, 1, directory, jobs.run_config(loop_count=2))
    return directory


def _load_and_look(path, config):
    """Loss with one loop right after loading, gates and their moments and updates, which parameter groups have gates,
    and a save and a load of what came of it."""
    import torch

    from plt_megatron.train.checkpoint.loading import load_checkpoint

    loaded = jobs.load_and_train(path, config, then=0)
    engine = jobs.build(config)
    load_checkpoint(engine, path)
    loss = jobs.evaluate(engine, loop_count=1)
    optimizer = engine.state.parts[0]
    gates = {p for name, p in engine.stage.named_parameters() if ".plt_gate." in name}
    moments, others, updates = [], [], []
    for parameter, part in optimizer.parameter_parts():
        if part is None:
            continue
        state = optimizer.inner.state[optimizer.main_parameter(parameter)]
        (moments if parameter in gates else others).append(float(state["exp_avg_sq"].max()))
        updates.append((parameter in gates, float(state["step"])))
    own = set(optimizer.main_parameters(gates))
    groups = [{main in own for main in group["params"]} for group in optimizer.inner.param_groups]
    zero = all(not torch.any(gate) for gate in gates)
    history = jobs.train(engine, 4, 5)
    save_checkpoint(engine, path.parent / f"{path.name}_continued", {"step": 5})
    again = jobs.load_and_train(path.parent / f"{path.name}_continued", config, then=1)
    went_on = jobs.train(engine, 6, 6)
    return {
        "log": loaded["log"],
        "loss": loss,
        "gates": len(gates),
        "zero": zero,
        "moments": moments,
        "others": others,
        "updates": {*updates},
        "mixed groups": [group for group in groups if len(group) > 1],
        "history": history,
        "continued": (again["after"], went_on),
    }


def test_one_loop_goes_on_with_two_in_a_layout_with_more_vocabulary_padding(run_distributed, tmp_path):
    one = run_distributed(jobs.train_save_evaluate, 1, tmp_path / "one", jobs.run_config(loop_count=1, **UNTIED))
    seen = run_distributed(
        _load_and_look, 2, tmp_path / "one", jobs.run_config(TP2, loop_count=2, **UNTIED), all_ranks=True
    )
    for rank in seen:
        assert rank["loss"] == pytest.approx(one, rel=1e-5)  # the weights are the one-loop model's
        assert rank["gates"] == 4 and rank["zero"] and not any(rank["moments"]) and min(rank["others"]) > 0
        assert rank["updates"] == {(True, 0.0), (False, 3.0)}
        assert not rank["mixed groups"], "a group may have one count of updates"
        assert rank["continued"][0] == rank["continued"][1]
    about_gates = [line for line in seen[0]["log"] if "gate" in line]
    assert len(about_gates) == 1 and "has no gates: this model's are new, with fresh optimizer state" in about_gates[0]
    assert "model.loop_count: 1 in the checkpoint, now 2" in seen[0]["log"]
    assert not seen[1]["log"]


def test_two_loops_go_on_with_one(run_distributed, two_loops, tmp_path):
    path = tmp_path / "two"
    path.symlink_to(two_loops)
    seen = run_distributed(_load_and_look, 2, path, jobs.run_config(PP2, loop_count=1))
    assert seen["gates"] == 0 and min(seen["others"]) > 0 and seen["history"][0][0] > 1
    about_gates = [line for line in seen["log"] if "gates" in line]
    assert len(about_gates) == 1 and "are dropped: this model has none" in about_gates[0]


def test_two_loops_go_on_with_three_and_nothing_to_say_of_gates(run_distributed, two_loops):
    seen = run_distributed(jobs.load_and_train, 1, two_loops, jobs.run_config(loop_count=3), then=1)
    assert seen["log"] == ["model.loop_count: 2 in the checkpoint, now 3"]


def test_anything_else_missing_or_of_another_shape_is_named(run_distributed, two_loops):
    shape = r"has shape \([\d, ]+\), this model needs \([\d, ]+\)"
    cases = [
        (
            {"qk_layernorm": True},
            r"lacks the tensor decoder\.layers\.self_attention\.k_layernorm\.weight and \d+ more, ",
        ),
        ({"hidden_size": 48}, r"the tensor decoder\.layers\.\S+ " + shape),
        ({"num_layers": 3}, r"the tensor decoder\.layers\.\S+ has shape \(2, .*, this model needs \(3, "),
        ({"gate_input": "hidden"}, r"the tensor decoder\.layers\.\S+plt_gate.weight " + shape),
        (UNTIED, r"lacks the tensor output_layer\.weight and 3 more, which this model needs"),
    ]
    configs = [jobs.run_config(TP2, **model) for model, _ in cases]
    ranks = run_distributed(_errors_of_loads, 2, two_loops, configs, all_ranks=True)
    assert ranks[0] == ranks[1]
    for error, (_, message) in zip(ranks[0], cases, strict=True):
        assert "\n" not in error
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(error)


def _errors_of_loads(path, configs):
    return [jobs.error_of_load(path, config) for config in configs]


def test_a_tensor_the_model_has_not_is_named(run_distributed, tmp_path):
    run_distributed(jobs.train_and_save, 1, tmp_path, jobs.run_config(norm_placement="pre_ffn_output"), steps=1)
    error = run_distributed(jobs.error_of_load, 1, tmp_path, jobs.run_config())
    assert "has the tensor decoder.layers.mlp." in error and "which this model lacks" in error


def test_another_vocabulary_is_refused_although_its_padded_size_fits(run_distributed, two_loops):
    error = run_distributed(jobs.error_of_load, 1, two_loops, jobs.run_config(), vocab_size=118)
    assert error.endswith("its vocabulary has 117 entries, this run's 118; use its tokenizer")


def test_weights_alone_start_a_new_run(run_distributed, two_loops):
    config = jobs.run_config(PP2, "bf16")
    config.optimizer.lr = 1e-3
    seen = run_distributed(jobs.load_and_train, 2, two_loops, config, then=1, weights_only=True)
    trained, fresh = run_distributed(_trained_and_fresh_loss, 1, two_loops, jobs.run_config())
    assert seen["after"][0][0] == pytest.approx(trained, rel=3e-3)  # trained weights in bf16 ...
    assert abs(seen["after"][0][0] - fresh) > 3e-2  # ... not fresh ones
    assert seen["progress"]["step"] == 3
    assert "training.precision: fp32 in the checkpoint, now bf16" in seen["log"]


def _trained_and_fresh_loss(path, config):
    from plt_megatron.train.checkpoint.loading import load_checkpoint

    engine = jobs.build(config)
    fresh = jobs.evaluate(engine, loop_count=2)
    load_checkpoint(engine, path)
    return jobs.evaluate(engine, loop_count=2), fresh


def test_fp32_state_goes_on_in_bf16_with_an_exact_main_copy(run_distributed, two_loops):
    seen = run_distributed(jobs.main_parameters, 1, two_loops, jobs.run_config(precision="bf16"))
    exact = run_distributed(jobs.main_parameters, 1, two_loops, dataclasses.replace(jobs.run_config()))
    assert seen == exact


def test_bf16_state_goes_on_in_fp32_with_the_main_copy_on_all_ranks(run_distributed, tmp_path):
    """In fp32 main parameters and the model's are the same memory, and the checkpoint's model is rounded."""
    assert run_distributed(jobs.go_on_in_fp32, 2, tmp_path) == [(True, True)] * 2


FACTOR = {"lr_mult": RateFactors(embedding=4.0)}


@pytest.fixture(scope="module")
def in_two_stages(run_distributed, tmp_path_factory):
    """A checkpoint whose embedding has a rate of its own."""
    config = jobs.run_config(PP2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **FACTOR))
    return run_distributed(jobs.train_and_save, 2, tmp_path_factory.mktemp("two_stages"), config, steps=1)["path"]


@pytest.mark.parametrize(
    ("change", "doubted"),
    [
        ({}, False),
        ({"replicas_compared": None}, True),
        ({"replicas_compared": None, "weights_only": True}, False),
        ({"replicas_compared": None, "layout": {"pipeline_model_parallel_size": 1}}, False),
        ({"replicas_compared": None, "optimizer": {"lr_mult": {"embedding": 1.0}}}, False),
        ({"replicas_compared": None, "optimizer": {"wd_mult": {"embedding": 0.0}}}, True),
        ({"replicas_compared": None, "optimizer": {}}, False),
        ({"replicas_compared": None, "model": {"share_embeddings_and_output_weights": False}}, False),
    ],
)
def test_a_checkpoint_of_stages_whose_embeddings_drifted_apart_is_told(in_two_stages, change, doubted):
    """A version that did not compare them wrote it, and the last stage's copy of the embedding missed a factor."""
    progress = read_progress(in_two_stages)
    sections = {name: progress["config"][name] | part for name, part in change.items() if name in progress["config"]}
    if change.get("optimizer") == {}:
        sections = {"optimizer": {"lr": 1e-3}}  # before there were factors
    others = {name: value for name, value in change.items() if name not in progress["config"]}
    reason = doubt(in_two_stages, progress | others | {"config": progress["config"] | sections})
    assert (reason is not None) == doubted
    if reason is not None:
        assert str(in_two_stages) in reason and "_mult.embedding " in reason and "\n" not in reason


def test_loading_and_exporting_one_that_is_in_doubt_say_so_in_a_line(run_distributed, in_two_stages, tmp_path, caplog):
    path = tmp_path / in_two_stages.name
    shutil.copytree(in_two_stages, path)
    progress = jobs.edit_progress(path, lambda progress: progress.pop("replicas_compared"))
    config = jobs.run_config(TP2)
    lines = {}
    for which in (in_two_stages, path):
        ranks = run_distributed(jobs.load_and_train, 2, which, config, then=0, weights_only=True, all_ranks=True)
        caplog.clear()
        open_source(which)
        lines[which] = [*ranks[0]["log"], *ranks[1]["log"], *(record.getMessage() for record in caplog.records)]
    assert not lines[in_two_stages]
    assert len(lines[path]) == 2 and lines[path][0] == lines[path][1] == doubt(path, progress)


def _errors_of_loading(folders):
    """Load each one's checkpoint into the other's engine, and then its weights alone; return the errors."""
    from plt_megatron.train.checkpoint.loading import load_checkpoint, load_weights

    engines = {name: jobs.build(jobs.run_config(optimizer=name)) for name in folders}
    errors = []
    for name, folder in folders.items():
        jobs.train(engines[name], 1, 1)
        save_checkpoint(engines[name], folder, {"step": 1})
    for name, other in (("sgd", "adam"), ("adam", "sgd"), ("muon", "adam"), ("adam", "muon")):
        for allow in (False, True):
            try:
                load_checkpoint(engines[name], folders[other], allow_other_schedule=allow)
            except UserError as error:
                errors.append(str(error))
        load_weights(engines[name], folders[other])
        jobs.train(engines[name], 1, 1)
    return errors


def test_an_optimizer_does_not_go_on_from_anothers_state(run_distributed, tmp_path):
    folders = {name: tmp_path / name for name in ("adam", "sgd", "muon")}
    errors = run_distributed(_errors_of_loading, 1, folders)
    assert [re.search(r"optimizer\.name (\w+ \(now \w+\))", error)[1] for error in errors] == [
        *["adam (now sgd)"] * 2,
        *["sgd (now adam)"] * 2,
        *["adam (now muon)"] * 2,
        *["muon (now adam)"] * 2,
    ]
    assert all("checkpoint.weights_only=true" in error and "\n" not in error for error in errors)
