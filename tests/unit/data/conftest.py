"""A small corpus, tokenizers trained on it, and a way to run the tools."""

from __future__ import annotations

import multiprocessing
import subprocess
from pathlib import Path

import pytest
from data_helpers import Tool, make_texts, tool_environment, train, write_jsonl

from tests.running import ROOT


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of `preprocess` are forks of a process that has their imports. A command's start as a user's do."""
    context = multiprocessing.get_context("forkserver")
    modules = ("plt_megatron.data.shards", "sentencepiece", "transformers.models.auto.tokenization_auto")
    context.set_forkserver_preload(list(modules))
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts)


@pytest.fixture(scope="session")
def bpe_model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train(corpus, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def unigram_model(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return train(corpus, tmp_path_factory.mktemp("unigram"), model_type="unigram")


@pytest.fixture(scope="session")
def run_tool(warm_python: str) -> Tool:
    """Run a script of tools/ in a folder that is not the repository's; never raises."""

    def run(name: str, *arguments: object, cwd: Path = Path("/")) -> subprocess.CompletedProcess[str]:
        command = [warm_python, str(ROOT / "tools" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=tool_environment())

    return run
