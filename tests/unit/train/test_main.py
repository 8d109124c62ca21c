"""Who says what is wrong: each node's first rank, since a file may be missing on one node alone."""

from __future__ import annotations

import pytest

from plt_megatron.train import main as module


@pytest.mark.parametrize(("local", "says"), [("0", True), ("1", False)])
def test_a_node_says_what_it_lacks(local, says, monkeypatch, tmp_path, capsys):
    for name in ("hear_every_interrupt", "go_on_without_readers"):
        monkeypatch.setattr(module, name, lambda: None)
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", local)
    assert module.main([str(tmp_path / "gone.yaml")]) == 2
    assert ("gone.yaml" in capsys.readouterr().err) == says
