"""Commands whose output nobody reads to the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plt_megatron.errors import run_command

ROOT = Path(__file__).resolve().parents[3]
ESTIMATE = [sys.executable, "tools/estimate.py", "configs/runs/plt2_tiny.yaml", "model.vocab_size=99"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_left_ends_without_a_traceback(unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipe = subprocess.PIPE
    with subprocess.Popen(ESTIMATE, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


def test_any_other_broken_pipe_is_an_error():
    def lose_a_connection() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(lose_a_connection)
