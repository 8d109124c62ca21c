"""What `plt inspect-data` shows is what the run reads; bad inputs are one line."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_helpers import run_preprocess, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset

from plt_megatron.commands import preprocess
from plt_megatron.commands.inspect_data import main
from plt_megatron.config.loader import load_config
from plt_megatron.data.datasets import build_datasets
from plt_megatron.data.inspection import Inspector, Run, ShownBatch, ShownPart, ShownSample, describe_batch
from plt_megatron.data.mix import required_samples
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError

EOD = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bpe_model: Path, texts: list[str]) -> Path:
    """A configuration of two sources and a held-out one, which has the first source's third document too."""
    folder = tmp_path_factory.mktemp("inspected")
    parts = {
        "one": texts[:150],
        "two": texts[150:250],
        "markup": ["<b>a & b</b> </s>"] * 9,
        "held": [*texts[250:], texts[2]],
    }
    for name, part in parts.items():
        run_preprocess([write_jsonl(folder / f"{name}.jsonl", part)], folder / name, bpe_model)
    sources = [{"path": str(folder / name), "weight": weight} for name, weight in (("one", 3), ("two", 1))]
    settings = {
        "name": "shown",
        "output_dir": str(folder / "runs"),
        "data": {
            "train_sources": sources,
            "validation_sources": [{"path": str(folder / "held"), "name": "held out"}],
            "tokenizer": str(bpe_model),
            "sequence_length": 48,
            "reset_at_document_boundaries": True,
        },
        "training": {"train_iters": 25, "global_batch_size": 4},
        "validation": {"iters": 40},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


@pytest.mark.parametrize("part", ["train", "validation"])
def test_samples_are_the_runs(part: str, run: Path) -> None:
    """Tokens of the named documents at the named places, encoded again, are the sample's; so are the masks."""
    config = load_config(run)
    tokenizer = load_tokenizer(config.data.tokenizer or "")
    other = load_config(run, [f"data.index_cache={run.parent / 'other'}"])
    built = build_datasets(other, required_samples(other), tokenizer)
    samples = getattr(built, part)
    batch = Inspector(config).batch(part, 3, 4)
    assert [sample.number for sample in batch.samples] == [8, 9, 10, 11]
    for shown in batch.samples:
        item = samples[shown.number]
        documents = IndexedDataset(shown.path)
        tokens = [documents[p.document].tolist()[p.first : p.first + p.length] for p in shown.parts]
        assert sum(tokens, []) == [*item["tokens"].tolist(), int(item["labels"][-1])]
        predicted = [run.predicted for p in shown.parts for run in p.runs for _ in range(run.tokens)]
        assert predicted == [False, *(item["loss_mask"] > 0).tolist()] and shown.predicted == sum(predicted)
        for p, ids in zip(shown.parts, tokens, strict=True):
            assert len(documents[p.document]) == p.total and p.resets
            assert [run.control for run in p.runs for _ in range(run.tokens)] == [token == EOD for token in ids]
            texts = {run.text for run in p.runs if run.control}
            assert texts <= {"</s>"} and ("</s>" in texts) == (EOD in ids)
            if p.first == 0:
                assert "".join(run.text for run in p.runs if not run.control) == tokenizer.decode(ids)


def test_under_a_schedule_a_batch_is_that_of_its_step(run: Path) -> None:
    stages = ["training.batch_schedule=[{until: 288, global_batch_size: 2}]", "training.train_iters=5"]
    inspector = Inspector(load_config(run, stages))
    shown = [inspector.batch("train", number, 9) for number in (3, 4)]
    assert [[sample.number for sample in batch.samples] for batch in shown] == [[4, 5], [6, 7, 8, 9]]
    assert [sample.number for sample in inspector.batch("validation", 3, 4).samples] == [8, 9, 10, 11]
    with pytest.raises(UserError, match="batch 6 of the train data: the run reads batches 1 to 5"):
        inspector.batch("train", 6, 1)


def test_samples_of_stages_are_shown_with_their_sources(run: Path) -> None:
    """The texts of the named documents, as in a run of one mix; the search looks through the stages' sources too."""
    one, two = ("{path: " + str(run.parent / name) + "}" for name in ("one", "two"))
    stages = f"data.stages=[{{until: 480, sources: [{one}]}}]"
    inspector = Inspector(load_config(run, [stages, f"data.train_sources=[{two}, {one}]", "training.train_iters=5"]))
    batches = [inspector.batch("train", number, 4) for number in (3, 4)]
    sources = [sample.source for batch in batches for sample in batch.samples]
    assert sources[:2] == ["one", "one"] and set(sources[2:]) == {"one", "two"}, "up to sample 10, and then"
    for shown in batches[0].samples:
        assert Path(shown.path).name == shown.source
        documents = IndexedDataset(shown.path)
        tokens = [documents[p.document].tolist()[p.first : p.first + p.length] for p in shown.parts]
        item = inspector.samples("train")[0][1][shown.number]
        assert sum(tokens, []) == [*item["tokens"].tolist(), int(item["labels"][-1])]
    only = [stages, f"data.train_sources=[{two}]", "training.train_iters=5"]
    assert Inspector(load_config(run, only)).find_duplicates(50).equal_documents == 1


def test_in_the_terminal_and_as_a_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main([str(run), "--batch", "2", "--samples", "3", "--duplicates", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    batch = Inspector(load_config(run)).batch("train", 2, 3)
    places = re.findall(r"--- document ([\d,]+), tokens ([\d,]+)-", shown)
    parts = [part for sample in batch.samples for part in sample.parts]
    assert places == [(f"{part.document:,}", f"{part.first + 1:,}") for part in parts]
    assert re.findall(r"<p>document ([\d,]+), tokens ([\d,]+)-", html) == places
    blocks = [unescape(re.sub(r"<[^>]*>", "", block)) for block in re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)]
    assert blocks == ["".join(run.text for run in part.runs) for part in parts]
    assert "1 of 51 validation documents" in shown.replace("\n", " ")
    assert "held out document 50 at token 1 = one document 2 at token 1" in shown
    assert "held out: document 50, token 1" in html
    assert not re.search(r"<script|https?://|src=", html)


def test_text_is_escaped(run: Path, tmp_path: Path) -> None:
    """Markup in a document is text, and the name of a control token in it characters."""
    only = [f"data.train_sources=[{{path: {run.parent / 'markup'}}}]", f"output_dir={tmp_path}"]
    assert main([str(run), *only, "--html", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<b>" not in html and "&lt;b&gt;" not in html.split("<pre>")[0]
    assert re.search(r"&amp; b&lt;/b&gt; &lt;/s&gt;</span><span class=\" control\">&lt;/s&gt;</span>", html)


def test_a_document_does_not_command_the_terminal() -> None:
    part = ShownPart(0, 0, 3, 3, 0, None, False, [Run("a\x1b]0;x\x07\x9b\r\tb\nc", True, False, 3)])
    sample = ShownSample(0, "one", "one", 2, 2, [part])
    lines = describe_batch(ShownBatch("train", 1, 1, 2, [sample])).splitlines()
    assert lines[-2:] == ["  | a\\x1b]0;x\\x07\\x9b\\r\tb", "  | c"]


def test_without_a_tokenizer(run: Path) -> None:
    config = load_config(run, ["data.tokenizer=null", "model.vocab_size=600"])
    sample = Inspector(config).batch("train", 1, 1).samples[0]
    ids = [int(word) for part in sample.parts for run in part.runs for word in run.text.split()]
    assert len(ids) == 49


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "26"], "batch 26 of the train data: the run reads batches 1 to 25"),
        (["--part", "validation", "validation.iters=0"], "the run reads no validation data: set validation.iters"),
        (["--duplicates", "validation.iters=0"], "the run reads no validation data"),
        (["--html", "."], "--html . is a folder: name a file"),
        (["--html", "/dev/null/page.html"], "/dev/null"),
        (["data.sequence_length=none"], "data.sequence_length"),
        (["data.tokenizer=missing.model"], "data.tokenizer: missing.model not found"),
        (["data.train_sources=[{path: missing}]"], "missing.bin and missing.idx not found"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_file_that_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps({"nonsense": 1}))
    for path in (tmp_path / "a.yaml", tmp_path / "missing.yaml"):
        assert main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_parts_of_every_sample(run: Path) -> None:
    """Through all samples: the parts are what megatron-core reads."""
    samples: Any = Inspector(load_config(run)).samples("train")[0][1]
    for index in range(len(samples)):
        which, parts = samples.parts(index)
        dataset = samples._dataset.datasets[which]
        inner = int(samples._dataset.dataset_sample_index[index])
        text, documents, lengths = dataset._query_document_sample_shuffle_indices(inner)
        assert [part.document for part in parts] == documents.tolist()
        assert [part.length for part in parts] == lengths and sum(lengths) == len(text) == 49
    with pytest.raises(UserError, match="the run reads no test data"):
        Inspector(load_config(run)).samples("test")


def test_a_run_that_goes_on_is_shown_and_indexed_in_its_recorded_order(run: Path, tmp_path: Path) -> None:
    """Its length is in tokens, and its batches are larger now: it has drawn 107 samples, of which it would draw 104."""
    settings = [f"output_dir={tmp_path}", f"data.index_cache={tmp_path}/cache", "training.train_iters=null"]
    settings += ["training.train_tokens=5136", "training.global_batch_size=8", "validation.by_source=true"]
    config = load_config(run, settings)
    progress = {"format": 1, "config": {"training": {"train_tokens": 5136}, "data": {"sequence_length": 48}}}
    folder = tmp_path / "shown/checkpoints/step_00000004"
    folder.mkdir(parents=True)
    sampling = {"data_fingerprint": {"sampling": {"num_samples": 107}}}
    (folder / "progress.json").write_text(json.dumps(progress | sampling))
    assert preprocess.main(["--build-index", str(run), *settings]) == 0
    built = set((tmp_path / "cache").iterdir())
    assert len(built) == 2, "of the mix, and of the validation source alone"
    ours = Inspector(config).samples("train")[0][1]
    train = build_datasets(config, (107, 320, 0), load_tokenizer(config.data.tokenizer or "")).train
    assert train and built == set((tmp_path / "cache").iterdir()) and len(ours) == len(train) == 107


def test_what_transformer_engine_alone_cannot_do_is_no_matter(run: Path, tmp_path: Path, capsys) -> None:
    """Whether it is installed or not: a run on the CPU does without it, and neither command trains."""
    settings = [f"output_dir={tmp_path}", "parallel.context_parallel_size=2", "training.precision=bf16"]
    assert main([str(run), *settings]) == 0, capsys.readouterr().err
    assert preprocess.main(["--build-index", str(run), *settings]) == 0, capsys.readouterr().err


def test_by_source_each_sources_own_samples_are_shown_and_searched(run: Path) -> None:
    """The run reads as many of a source of small weight: here training text, of which hardly any is in the mix."""
    held, leaked = f"{{path: {run.parent}/held}}", f"{{path: {run.parent}/one, weight: 0.01}}"
    settings = [f"data.validation_sources=[{held}, {leaked}]", "validation.iters=8", "validation.by_source=true"]
    inspector = Inspector(load_config(run, settings))
    shown = [inspector.batch("validation", number, 1).samples[0] for number in (1, 8, 9, 16)]
    assert [(sample.source, sample.number) for sample in shown] == [("held", 0), ("held", 28), ("one", 0), ("one", 28)]
    with pytest.raises(UserError, match="batches 1 to 16"):
        inspector.batch("validation", 17, 1)
    found = inspector.find_duplicates(50)
    alone = Inspector(load_config(run, [f"data.validation_sources=[{leaked}]", *settings[1:]])).find_duplicates(50)
    assert found.equal_documents >= alone.equal_documents > 10
