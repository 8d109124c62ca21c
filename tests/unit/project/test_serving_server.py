"""How serving/server.py starts a server: its tests with vLLM, which takes long to install, are in serving/tests."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest

from tests.unit.project.test_sweep_benchmarks import load


def test_a_server_has_its_models_name_and_is_reached_past_a_proxy(tmp_path, monkeypatch):
    server = load("server", "serving")
    started: list[list[str]] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        return popen(["false"], **options)

    monkeypatch.setattr(server.subprocess, "Popen", start)
    monkeypatch.setenv("no_proxy", "intranet")
    for _ in range(2):
        with pytest.raises(server.ServerError), server.serve(tmp_path / "model", tmp_path, name="tiny"):
            pass
    for command in started:
        assert command[command.index("--served-model-name") + 1] == "tiny"
    assert os.environ["no_proxy"] == "intranet,127.0.0.1"
