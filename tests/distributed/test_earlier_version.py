"""Files of an earlier version are read: its run goes on where it stopped, its export loads."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from plt_megatron.config.loader import load_config
from tests.distributed.training_jobs import train
from tests.distributed.whole_runs import numbers

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((FIXTURE / "recorded.json").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format_1")
    with tarfile.open(FIXTURE / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_run_goes_on_with_weights_optimizer_and_data(files, recorded, run_distributed):
    """Step 4's loss tells the weights and the data's position, the steps after it the moments and the schedule."""
    config = load_config(FIXTURE / "run.yaml", [f"output_dir={files}", f"data.sources=[{{path: {files}/data/text}}]"])
    assert run_distributed(train, 1, config) is True
    records = numbers(config)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(records[3:], recorded["steps"], strict=True):
        assert {name: ours[name] for name in theirs} == {
            name: value if name == "source_epochs" else pytest.approx(value, rel=1e-5) for name, value in theirs.items()
        }


@pytest.mark.parametrize("code", ["today's", "its own"])
def test_its_export_loads(files, recorded, code):
    from transformers import AutoModelForCausalLM

    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    if code == "today's":
        model = PLTForCausalLM.from_pretrained(files / "export", dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(files / "export", trust_remote_code=True, dtype=torch.float32)
        assert not isinstance(model, PLTForCausalLM)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(recorded["tokens"]), use_cache=False).logits
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), rtol=1e-4, atol=1e-5)
