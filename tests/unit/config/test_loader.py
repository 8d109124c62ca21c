"""YAML files, overrides and the schema's types; messages name file, line, key and the nearest known one."""

from __future__ import annotations

import dataclasses
import errno
import io
import math
from pathlib import Path

import pytest

from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.config.schema import DataSource, RunConfig
from plt_megatron.errors import AttemptFailed, UserError
from plt_megatron.run_folder.folder import save_config


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_is_the_defaults(write):
    assert load_config(write("")) == RunConfig()
    assert load_config(write("# nothing\nmodel:\n")) == RunConfig()


def test_values_get_the_schema_types(write):
    config = load_config(
        write(
            """
            name: 007            # text, however much it looks like a number
            optimizer: {lr: 1e-4, min_lr: 1, adam_eps: 1.0e-15}
            training: {train_tokens: 400e9, global_batch_size: 1_000, deterministic: true}
            validation: {loop_counts: [1, 2]}
            data:
              split: 90,10,0
              sources:
                - path: a
                - {path: b, weight: 2, max_epochs: 1.5}
            logging: {wandb_project: yes, peak_tflops: ~}
            """
        )
    )
    assert config.name == "007"
    assert (config.optimizer.lr, config.optimizer.adam_eps) == (1e-4, 1e-15)
    assert config.optimizer.min_lr == 1.0 and isinstance(config.optimizer.min_lr, float)
    assert config.training.train_tokens == 400_000_000_000
    assert isinstance(config.training.train_tokens, int)
    assert config.training.global_batch_size == 1000 and config.training.deterministic is True
    assert config.validation.loop_counts == [1, 2]
    assert config.data.split == "90,10,0"
    assert config.data.sources == [DataSource("a"), DataSource("b", weight=2.0, max_epochs=1.5)]
    assert config.logging.wandb_project == "yes" and config.logging.peak_tflops is None


def test_overrides_win_over_the_file_and_later_over_earlier(write):
    path = write("model: {num_layers: 2, hidden_size: 64}\nname: x\n")
    config = load_config(
        path,
        [
            "model.num_layers=6",
            "model.num_layers=8",
            "optimizer.lr=1e-4",
            "training.train_tokens=4e11",
            "data.tokenizer=null",
            "name=2026-11",
            "data.split=90,10,0",
            "validation.loop_counts=[1, 3]",
            "data.sources=[{path: p/q=r, weight: 0.5}]",
            "parallel={sequence_parallel: true}",
        ],
    )
    assert (config.model.num_layers, config.model.hidden_size) == (8, 64)
    assert config.optimizer.lr == 1e-4 and config.training.train_tokens == 4 * 10**11
    assert config.name == "2026-11" and config.data.split == "90,10,0" and config.data.tokenizer is None
    assert config.validation.loop_counts == [1, 3]
    assert config.data.sources == [DataSource("p/q=r", 0.5)]
    assert config.parallel.sequence_parallel is True


def test_includes_merge_in_order_relative_to_the_file(write):
    write("model: {num_layers: 2, hidden_size: 64, window_size: 8}\nname: inner\n", "models/m.yaml")
    write("include: ../models/m.yaml\nmodel: {hidden_size: 96}\n", "more/n.yaml")
    write("data: {sources: [{path: a}, {path: b}]}\n", "data/d.yaml")
    path = write(
        "model: {num_layers: 7}\ndata: {sources: [{path: c}]}\ninclude: [../more/n.yaml, ../data/d.yaml]\n",
        "runs/r.yaml",
    )
    config = load_config(path)
    assert (config.model.num_layers, config.model.hidden_size, config.model.window_size) == (7, 96, 8)
    assert config.name == "inner"
    assert config.data.sources == [DataSource("c")]  # a list is replaced whole


@pytest.mark.parametrize("included", ["configs/runs/plt2_tiny.yaml", "../runs/plt2_tiny.yaml"])
def test_a_file_of_ones_own_includes_a_shipped_one(write, tmp_path, monkeypatch, included):
    """As an installed wheel's user has it: no `configs` here but their own."""
    monkeypatch.chdir(tmp_path)
    write(f"include: [{included}]\nname: mine\n", "configs/mine/run.yaml")
    config = load_config("configs/mine/run.yaml")
    assert config.name == "mine" and config.optimizer.lr == 3e-3
    write("name: nearer\n", "configs/runs/plt2_tiny.yaml")
    assert load_config("configs/mine/run.yaml").optimizer.lr != 3e-3, "a file that is there comes first"
    write("include: [elsewhere.yaml]\n", "configs/mine/run.yaml")
    write("name: elsewhere\n", "elsewhere.yaml")
    assert "No such file" in failure("configs/mine/run.yaml"), "only configs/... is looked for elsewhere"


def test_bad_includes_are_named(write, tmp_path):
    path = write("include: [b.yaml]\n", "a.yaml")
    assert "a.yaml: include: cannot read" in failure(path) and "No such file" in failure(path)
    write("include: a.yaml\n", "b.yaml")
    assert "leads back to itself" in failure(path)
    for bad in ("include: {a: b}\n", "include: [[x]]\n", "include:\n"):
        assert "include: expected a path or a list of paths" in failure(write(bad))
    assert failure(tmp_path).endswith("Is a directory")
    run = write("name: run\n", "run/config.yaml")
    assert failure(run.parent).endswith(f"Is a directory: a run's folder, give {run}")


@pytest.mark.parametrize("name", ["a.yaml", "b.yaml"])
def test_a_disk_that_does_not_answer_may_have_the_file_next_time(write, monkeypatch, name):
    path, open_file = write("include: [b.yaml]\n", "a.yaml"), io.open
    write("name: b\n", "b.yaml")

    def away(file, *rest, **named):
        if Path(file).name == name:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(file, *rest, **named)

    monkeypatch.setattr(io, "open", away)
    with pytest.raises(AttemptFailed, match=f"cannot read .*{name}: Input/output error"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  num_layer: 3\n", ":2: unknown key model.num_layer; did you mean model.num_layers?"),
        ("modle: {}\n", ":1: unknown key modle; did you mean model?"),
        ("optimizer: {train_iters: 3}\n", "optimizer.train_iters; did you mean training.train_iters?"),
        ("loop_count: 3\n", "unknown key loop_count; did you mean model.loop_count?"),
        ("model.moe.router_topk: 3\n", "sections contain their keys: write model: {moe: {router_topk: ...}}"),
        ("axes: {}\n", "unknown key axes; it is a setting of a sweep (plt sweep)"),
        ("title: x\n", "it is a setting of a sweep (plt sweep) or a study (plt study)"),
        ("zzz: 3\n", "unknown key zzz; known here: name, output_dir, model"),
        ("data: {sources: [{pth: x}]}\n", "unknown key data.sources[0].pth; did you mean data.sources[0].path?"),
        ("model: {<<: {num_layers: 3}}\n", "unknown key model.<<"),
        ("[1]: 3\n", "expected a setting's name"),
        ("deepspeed: {config: &all {a: *all}}\n", ":1: an alias inside this stands for all of it"),
        (
            "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 0}]\n" for i in range(10)),
            ":7: aliases inside this make more than 1,000,000 values",
        ),
        ('include: "a\\0b"\n', "run.yaml:1: 'a\\x00b' has a NUL character"),
        ('training: {train_iters: 2}\noutput_dir: "a\\0b"\n', "run.yaml:2: 'a\\x00b' has a NUL character"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(write, text, expected):
    message = failure(write(text))
    assert expected in message
    assert "run.yaml:" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {num_layers: four}", "model.num_layers: expected an integer, got 'four'"),
        ("model: {num_layers: 2.5}", "model.num_layers: expected an integer, got '2.5'"),
        ("model: {num_layers: 2.0}", "model.num_layers: expected an integer, got '2.0'"),
        ("model: {num_layers: '2'}", "model.num_layers: expected an integer, got '2'"),
        ("model: {num_layers: null}", "model.num_layers: expected an integer, got nothing (null)"),
        ("model: {num_layers: true}", "expected an integer, got 'true'"),
        ("model: {num_layers: [2]}", "expected an integer, got a list"),
        ("model: {qk_layernorm: 1}", "model.qk_layernorm: expected true or false, got '1'"),
        ("model: {qk_layernorm: yes}", "expected true or false, got 'yes'"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer: {lr: true}", "optimizer.lr: expected a number, got 'true'"),
        ("training: {train_tokens: 1.5e0}", "training.train_tokens: expected an integer, got '1.5e0'"),
        ("training: {train_tokens: " + "9" * 5000 + "}", f"expected an integer, got '{'9' * 60}...'"),
        ("training: {train_tokens: 1e999}", "training.train_tokens: expected an integer, got '1e999'"),
        ("training: {precision: fp8}", "expected one of fp32, bf16; got 'fp8'; did you mean fp32?"),
        ("optimizer: {lr_decay_style: wsd}", "expected one of cosine, linear, constant, WSD; got 'wsd'"),
        ("name:", "name: expected a string, got nothing (null)"),
        ("name: {a: b}", "name: expected a string, got a mapping"),
        ("model: 3", "model is a section (model.num_layers, "),
        ("model: [1]", "got a list"),
        ("validation: {loop_counts: 2}", "validation.loop_counts: expected a list of integers, got '2'"),
        ("validation: {loop_counts: [1, x]}", "validation.loop_counts[1]: expected an integer, got 'x'"),
        ("data: {sources: [a]}", "data.sources[0]: expected a mapping of path, weight, name, max_epochs"),
        ("data: {sources: {path: a}}", "data.sources: expected a list of mappings, got a mapping"),
        ("model: {num_layers: 1}\nmodel: {num_layers: 2}", ":2: model is given twice"),
        ("model: {num_layers: 1, num_layers: 2}", "model.num_layers is given twice"),
        ("- model", "expected `key: value` lines, got a list"),
        ("name: [", "not valid YAML"),
        ("name: 'x", "not valid YAML"),
        ("name: x\n---\nname: y", "not valid YAML"),
        ("a\tb: *nowhere", "not valid YAML"),
        ("name: \x07", "not valid YAML"),
        ("name: !!python/object/apply:os.system [echo]", "name: expected a string, got a list"),
        ("name: " + "[" * 5000, "nest"),  # libyaml and PyYAML have words of their own
    ],
)
def test_a_wrong_value_names_key_expected_and_got(write, text, expected):
    message = failure(write(text))
    assert expected in message
    assert "run.yaml" in message


def test_a_wrong_value_from_an_include_names_its_own_file(write):
    path = write("\n\nmodel: {num_layers: x}\n", "m.yaml")
    message = failure(write("include: ../m.yaml\nname: y\n", "runs/run.yaml"))
    assert message.startswith(f"{path}:3: model.num_layers")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layers", "expected key=value"),
        ("=3", "expected key=value"),
        ("model.num_layerz=3", "unknown key model.num_layerz; did you mean model.num_layers?"),
        ("modell.num_layers=3", "unknown key modell; did you mean model?"),
        ("model.num_layers.x=3", "unknown key model.num_layers"),
        ("model.num_layers=", "expected an integer, got nothing (null)"),
        ("model.num_layers=[", "not valid YAML"),
        ("model=3", "model is a section"),
        ("data.sources.0.path=x", "unknown key data.sources"),
        ("include=x", "unknown key include"),
    ],
)
def test_a_bad_override_names_itself(write, override, expected):
    message = failure(write(""), override)
    assert expected in message
    assert f"override '{override}'" in message


# ---------------------------------------------------------------- alternatives


SOURCES = "data: {sources: [{path: a}], split: '9,1,0'}\n"
PARTS = "data: {train_sources: [{path: b}], validation_sources: [{path: c}]}\n"


@pytest.mark.parametrize(("below", "above"), [(SOURCES, PARTS), (PARTS, SOURCES)])
def test_of_alternatives_a_later_layer_replaces_what_an_earlier_one_gave(write, below, above):
    write(below + "training: {train_tokens: 4e6}\n", "data/d.yaml")
    write(above + "training: {train_iters: 3}\n", "data/e.yaml")
    replaced = load_config(write("include: data/d.yaml\ntraining: {train_iters: 3}\n" + above))
    assert replaced.data.split == ("9,1,0" if "9,1,0" in below + above else "95,5,0")
    assert replaced == load_config(write("include: [data/d.yaml, data/e.yaml]\n"))
    assert bool(replaced.data.sources) == (above == SOURCES) == (replaced.data.train_sources == [])
    assert (replaced.training.train_iters, replaced.training.train_tokens) == (3, None)
    overridden = load_config(write(dump_config(replaced)), ["training.train_tokens=7", "data.sources=[{path: x}]"])
    assert overridden.data.sources == [DataSource("x")]
    assert overridden.data.train_sources == overridden.data.validation_sources == []
    assert (overridden.training.train_iters, overridden.training.train_tokens) == (None, 7)


def test_one_of_several_parts_replaces_only_what_excludes_it(write):
    path = write(PARTS)
    config = load_config(path, ["data.train_sources=[{path: x}]"])
    assert (config.data.train_sources, config.data.validation_sources) == ([DataSource("x")], [DataSource("c")])
    assert load_config(path, ["data.sources=[]", "training.train_iters=null"]) == load_config(path)


def test_both_alternatives_in_one_layer_are_refused_with_both_places(write):
    message = failure(write("training:\n  train_iters: 1\n  train_tokens: 1\n"))
    assert ":3: training.train_tokens: give either train_iters or train_tokens, not both" in message
    assert "(train_iters: " in message and message.endswith("run.yaml:2)")
    message = failure(write(SOURCES), "data.validation_sources=[{path: x}]", "data.sources=[{path: y}]")
    assert message.startswith("override 'data.validation_sources=[{path: x}]': data.validation_sources: give either ")
    assert "sources or train_sources/validation_sources/test_sources, not both (sources: override" in message
    write("training: {train_tokens: 2}\n", "t.yaml")
    assert load_config(write("include: t.yaml\ntraining: {train_iters: 1, train_tokens: null}\n"))


# ---------------------------------------------------------------- old names


def test_an_old_name_is_told_with_its_new_one_and_read_from_recorded_files(write):
    path = write("parallel:\n  local_cp_comm_type: all_gather\n")
    assert ":2: parallel.local_cp_comm_type is now parallel.window_cp_comm_type" in failure(path)
    assert "is now parallel.window" in failure(write(""), "parallel.local_cp_comm_type=a2a")
    path = write("parallel:\n  local_cp_comm_type: all_gather\n")
    assert load_config(path, accept_old_names=True).parallel.window_cp_comm_type == "all_gather"
    path = write("parallel: {local_cp_comm_type: a2a, window_cp_comm_type: a2a}\n")
    with pytest.raises(UserError, match=r"parallel.local_cp_comm_type is now parallel.window_cp_comm_type"):
        load_config(path, accept_old_names=True)


@pytest.mark.parametrize(
    ("key", "stage", "missing"),
    [
        ("training.batch_schedule", "until: 100", "global_batch_size"),
        ("training.batch_schedule", "global_batch_size: 8", "until"),
        ("data.length_schedule", "sequence_length: 8", "until"),
        ("data.length_schedule", "until: 100", "sequence_length"),
        ("data.stages", "sources: [{path: a}]", "until"),
        ("data.stages", "until: 100", "sources"),
    ],
)
def test_a_stage_says_when_it_ends_and_what_it_is(write, key, stage, missing):
    section, name = key.split(".")
    path = write(f"{section}:\n  {name}:\n  - {{{stage}}}\n")
    assert failure(path).endswith(f":3: {key}[0].{missing} is missing")


def test_not_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert "not UTF-8" in failure(path)


def every_value_changed(value):
    """A configuration in which no setting has its default and strings are awkward."""
    if dataclasses.is_dataclass(value):
        changes = {f.name: every_value_changed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changes)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 3
    if isinstance(value, float):
        return value * 1.1e-12
    return value


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = every_value_changed(RunConfig())
    config.model.gate_input = "hidden"
    config.data.split = "1,1,1"
    config.data.tokenizer = "null"
    config.data.index_cache = "~"
    config.name = "1e-4: # 'quoted'\n\tü \"x\" yes"
    config.output_dir = ""
    config.logging.wandb_project = "true"
    config.logging.peak_tflops = math.inf
    config.data.sources = [DataSource("a b", 1e-300, "0x1f", None), DataSource("-", 1e300, None, 1 / 3)]
    config.validation.loop_counts = [1, 2, 8]
    path = tmp_path / "deep" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert path.read_text(encoding="utf-8") == dump_config(config)
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_saving_replaces_and_reports_what_it_cannot(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    save_config(RunConfig(), path)
    assert load_config(path) == RunConfig()
    with pytest.raises(UserError, match="cannot write"):
        save_config(RunConfig(), path / "below-a-file" / "config.yaml")
