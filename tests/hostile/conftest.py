"""One folder for all: as a user's is after the first day, with the broken files that lie around in such folders.

Nothing that is refused changes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

RUN = """
name: mine
model: {num_layers: 1, hidden_size: 32, num_attention_heads: 2, ffn_hidden_size: 64, loop_count: 2}
data: {sources: [{path: data/text}], tokenizer: tokenizer/tokenizer.model, sequence_length: 16}
training: {train_iters: 2, micro_batch_size: 2, global_batch_size: 4, precision: fp32}
optimizer: {lr: 3e-3, min_lr: 3e-4, lr_warmup_iters: 1}
validation: {interval: 0, iters: 1}
"""


class World:
    """The folder, and the commands in it.

    Attributes:
        python: runs them: `tests/warm_python.py`'s.
    """

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.python = folder, python

    def run(
        self, command: str, *arguments: str, env: Mapping[str, str] | None = None, **options
    ) -> subprocess.CompletedProcess[str]:
        """`plt COMMAND ARGUMENTS`."""
        return subprocess.run(
            [self.python, "-m", "plt_megatron", command, *arguments],
            cwd=self.folder,
            env=os.environ | (env or {}),
            text=True,
            **{"capture_output": True, "timeout": 240, "stdin": subprocess.DEVNULL} | options,
        )

    def make(self) -> None:
        """Tokenizer, data, a finished run of two steps and its export; then what is broken."""
        generator = random.Random(0)
        words = ["".join(generator.choices("abcdefgh", k=generator.randrange(2, 6))) for _ in range(80)]
        lines = [json.dumps({"text": " ".join(generator.choices(words, k=30))}) for _ in range(120)]
        self._write("text.jsonl", "\n".join(lines))
        self._write("run.yaml", RUN)
        made = [
            ("train-tokenizer", "--input", "text.jsonl", "--output", "tokenizer", "--vocab-size", "380"),
            ("preprocess", "--input", "text.jsonl", "--tokenizer", "tokenizer", "--output-prefix", "data/text"),
            ("train", "run.yaml"),
            ("export", "--checkpoint", "runs/mine", "--output", "exported"),
        ]
        for command, *arguments in made:
            done = self.run(command, *arguments)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        self._break()

    def _break(self) -> None:
        self._write("empty.yaml", "")
        self._write("notes.txt", "a note\n")
        self._write("empty.jsonl", "")
        self._write("latin.jsonl", b'{"text": "\xe9\xe8"}\n')
        self._write("no_json.jsonl", "this is no JSON\n")
        self._write("broken_hf/config.json", "{")
        self._write("other_hf/config.json", '{"model_type": "resnet"}')
        self._write("weightless/config.json", (self.folder / "exported/config.json").read_bytes())
        self._write("tokenizer_of_notes/tokenizer.model", "no tokenizer")
        for suffix in ("idx", "bin"):
            self._write(f"data/short.{suffix}", (self.folder / f"data/text.{suffix}").read_bytes()[:-4])
        self._write("data/cut.idx", (self.folder / "data/text.idx").read_bytes())
        self._write("data/cut.bin", (self.folder / "data/text.bin").read_bytes()[:100])
        self._write("runs/unstarted/config.yaml", (self.folder / "runs/mine/config.yaml").read_bytes())
        self._write("runs/garbled/config.yaml", (self.folder / "runs/mine/config.yaml").read_bytes())
        self._write("runs/garbled/metrics.jsonl", "{broken\n{more\n")
        self._write("archived/smoke/records.tar.xz", "no archive")
        self._write("tasks/notes.yaml", "a: [\n")
        (self.folder / "no_data").mkdir()
        (self.folder / "loop").symlink_to("loop")

    def _write(self, name: str, content: str | bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def content(self) -> dict[str, str]:
        """Path -> SHA-256 of everything in the folder; of folders and links what they are."""
        found = {}
        for root, folders, files in os.walk(self.folder):
            for name in (*folders, *files):
                path = Path(root, name)
                key = str(path.relative_to(self.folder))
                if path.is_symlink():
                    found[key] = f"link to {path.readlink()}"
                elif path.is_dir():
                    found[key] = "folder"
                else:
                    found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> World:
    made = World(tmp_path_factory.mktemp("hostile"), warm_python)
    made.make()
    return made
