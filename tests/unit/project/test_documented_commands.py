"""Every command in a fenced block of README and docs runs, in order, in a folder of a newcomer with a small corpus.

A page is read for its blocks of `bash`, and of no language, whose lines begin with a command; its prose is free.
README's block of `python` runs after them.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from plt_megatron.config.loader import dump_config, load_config
from plt_megatron.experiments.sweep_plan import records_of
from tests import running
from tests.running import ROOT
from tests.unit.data.data_helpers import chat_tokenizer
from tests.unit.slurm.fake_slurm import FakeSlurm, write_tokenizer, write_tokens

PAGES = ["README.md", "CONTRIBUTING.md", "configs/README.md", "results/paper_ablation/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"(plt|python|make|pip|export|mkdir|tar)\b.*")

DOCUMENTS = [f"Once upon a time loop {i} ran {i * i} times over every token of text {i % 7}." for i in range(2000)]

# What is not run as it is written: where it is found, what stands in for it (nothing: it is left out), and why.
INSTEAD = [
    (r"^make\b", "make --no-print-directory -n -C $ROOT", "takes minutes; each target has tests of its own"),
    (r"^pip install.*", "", "installs from the network; test_wheel.py installs"),
    (r"^export SLURM_CONF.*", "", "starts the tests' own Slurm, which tests/slurm does; here Slurm only answers"),
    (r" --follow\b", "", "waits for a job, and there is none"),
    (r" --cluster NAME\b", " --cluster h100_modules", "a name for the reader to fill in"),
    (r" --vocab-size 32000\b", " --vocab-size 400", "the small corpus has no 32,000 pieces"),
    (r"^plt train-tokenizer .* --output data\b", r"\g<0> --overwrite", "the folder has the large run's tokenizer"),
    (r"^plt preprocess --chat\b.*", r"\g<0> --workers 1", "a worker imports transformers for seconds"),
    (r"^plt doctor\b.*", "plt doctor --help", "takes ten seconds; test_doctor.py runs it"),
    (r"^python benchmarks/gpu.py.*", "python $ROOT/benchmarks/gpu.py --help", "needs a GPU"),
    (r"^plt train .*deepspeed.zero_stage=.*", r"\g<0> --print-config", "needs DeepSpeed and a 1.2B model's memory"),
    (r"^plt train configs/runs/plt2_tiny.yaml --dry-run\b", r"\g<0> name=dry", "README has trained the run"),
    (r"^plt train configs/runs/plt2_moe_tiny.*", r"\g<0> --dry-run", "trained by tests/distributed"),
    (r"^plt train .* name=longer .*", r"\g<0> training.train_iters=3", "the first run has taken more"),
    (r"^plt train .* name=tiny_l1 .*", r"\g<0> --dry-run", "README's commands have trained this configuration"),
    (r"^plt train .* name=from_average .*", r"\g<0> --dry-run", "tests/distributed starts one"),
    (r"^plt export .* --ema .*", "plt export --help", "seconds; tests/distributed exports one"),
    (r"^plt average .* --weights .*", "plt average --help", "seconds; the page's first one is run"),
    (r"^plt import .*Qwen3.*", "plt import --help", "downloads; tests/unit/convert imports a tiny one"),
    (r"^plt evaluate .*", "plt evaluate --help", "takes ten seconds; tests/hf evaluates"),
    (r"^plt train .* name=evaluated .*", r"\g<0> --print-config", "takes half a minute; tests/distributed evaluates"),
    (r"^plt train .* name=trunk .*", r"\g<0> --dry-run", "tests/distributed branches; the test of a clone does both"),
    (r"^plt train --branch-from runs/trunk.*", "plt train --help", "its trunk is not trained here"),
    (r"^plt train .* checkpoint\.(uploads\.to|load)=s3:.*", r"\g<0> --print-config", "tests/distributed uploads"),
    (r"^plt upload .*", "plt upload --help", "tests/unit/storage uploads to servers of its own"),
    (r"^plt sweep (?!.*--dry-run).*", r"\g<0> --dry-run", "takes an hour; test_sweep_smoke.py trains a sweep"),
    (r"^plt study (?!.*--dry-run).*", r"\g<0> --dry-run", "takes days; test_study_rounds.py goes through rounds"),
    (r"^plt rehearse .*", "plt rehearse --help", "takes a minute; tests/distributed rehearses"),
    (r" --rehearse\b", "", "takes a minute; tests/distributed rehearses"),
    (r"^plt report runs/sweeps/loop_count", "plt report results/paper_ablation", "the sweep was not trained"),
    (r"^plt report runs/sweeps/paper_ablation.*", "plt report --help", "the sweep is that of results"),
    (r" --measure-decode\b", "", "needs the checkpoints of a trained sweep"),
    (r"^plt train .*pipeline_model_parallel_size=2$", r"\g<0> training.train_iters=3", "tests/distributed trains more"),
    (r"^plt check-coordinates .* --axes depth loops$", r"\g<0> --steps 4", "test_coordinates.py takes more"),
    (r"^plt check-coordinates .*mup_base.*", r"\g<0> --axes width", "the page's first one has the other axes"),
    (r"^plt diagnose .*heldout.jsonl$", "plt diagnose --help", "README's commands have diagnosed this run"),
    (r"^plt diagnose exported .*", "plt diagnose --help", "README's commands have diagnosed this model's run"),
    (r"^plt diagnose .* --data .*", r"\g<0> --max-tokens 256", "minutes on 65,536 tokens"),
    (r"^plt submit .*plt2_1b.*", r"\g<0> model.num_layers=1 model.vocab_size=512", "needs room for 66 GB"),
    (r"configs/studies/cluster\.yaml", "cluster_study.yaml", "needs room for 63 GB of checkpoints"),
    (r"^plt submit .*plt2_tiny.*", r"\g<0> name=on_slurm", "README's commands have trained a run of its own name"),
]


def commands(page: str) -> list[str]:
    """The commands of a page, continuation lines joined."""
    shown = "".join(snippets(page, "", "bash"))
    lines = shown.replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if COMMAND.match(line)]


def snippets(page: str, *languages: str) -> list[str]:
    """The blocks in some languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in blocks if language in languages]


def stand_in(command: str) -> str:
    """The words that are run for a command."""
    words = re.sub(r"\s+#.*", "", command)  # a remark for the reader
    for pattern, replacement, _ in INSTEAD:
        words = re.sub(pattern, replacement, words)
    return words


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, str]:
    """This tree's `plt` first on PATH, and a Slurm that only answers."""
    slurm = FakeSlurm(tmp_path_factory.mktemp("slurm") / "slurm")
    programs = tmp_path_factory.mktemp("programs")
    (programs / "plt").write_text(f'#!/bin/sh\nexec "{warm_python}" -m plt_megatron "$@"\n')
    (programs / "plt").chmod(0o755)
    (programs / "python").symlink_to(warm_python)
    path = [str(programs), str(slurm.bin), str(Path(sys.executable).parent), os.environ["PATH"]]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MAKE"))}
    return kept | {
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "ROOT": str(ROOT),
        "FAKE_SLURM": str(slurm.folder),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages assume: texts, the demo's data and the large run's, a finished sweep."""
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "corpus").mkdir()
    for name, part in (("corpus/a", DOCUMENTS[::2]), ("corpus/b", DOCUMENTS[1::2]), ("corpus", DOCUMENTS[:50])):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text, "quality": len(text) % 10 / 10}) + "\n" for text in part)
        )
    shutil.copy(folder / "corpus.jsonl", folder / "heldout.jsonl")
    chat_tokenizer(folder / "chat")
    messages = [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": DOCUMENTS[0]}]
    (folder / "chat/chat.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 200)
    for run in ("plt2_tiny", "plt2_1b"):
        data = load_config(ROOT / f"configs/runs/{run}.yaml").data
        for source in [*data.sources, *data.train_sources, *data.validation_sources]:
            write_tokens(folder / source.path)
        assert data.tokenizer is not None
        write_tokenizer(folder / data.tokenizer)
    write_tokens(folder / "data/heldout")
    small = ("num_layers=1", "vocab_size=512", "ffn_hidden_size=256")  # checkpoints of few bytes
    for path, run, settings in (
        ("configs/runs/mine.yaml", "plt2_1b", [f"model.{size}" for size in small]),
        ("a.yaml", "plt2_tiny", ["name=a", "training.global_batch_size=64"]),
        ("b.yaml", "plt2_tiny", ["name=b", "training.global_batch_size=64"]),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(dump_config(load_config(ROOT / f"configs/runs/{run}.yaml", settings)))
    (folder / "list.txt").write_text("a.yaml\nb.yaml\n")
    write_small_study(ROOT / "configs/studies/cluster.yaml", folder / "cluster_study.yaml")
    shutil.copytree(ROOT / "results/paper_ablation", folder / "results/paper_ablation")
    shutil.copytree(records_of(ROOT / "results/paper_ablation"), folder / "runs/sweeps/paper_ablation")
    return folder


def write_small_study(shipped: Path, path: Path) -> None:
    """A shipped study with as many sizes, of models with which its checkpoints need hardly any room."""
    study = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    study["base"] = str((shipped.parent / study["base"]).resolve())
    study["set"]["model.vocab_size"] = 512
    small = {"model.hidden_size": 64, "model.ffn_hidden_size": 128, "model.num_attention_heads": 4}
    small |= {"model.num_query_groups": 2}
    study["sizes"] = {name: {"model.num_layers": layers, **small} for layers, name in enumerate(study["sizes"], 2)}
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "plt_megatron/commands").glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_in_a_commands_file_name_what_is_shipped(path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    named = re.findall(r"configs/[\w/]+\.yaml", text)
    named += [f"configs/clusters/{name}.yaml" for name in re.findall(r"--cluster (\w+)", text) if name != "mine"]
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_exception_is_of_a_documented_command():
    every = [re.sub(r"\s+#.*", "", command) for page in PAGES for command in commands(page)]
    assert len(commands("README.md")) >= 15
    for pattern, _, reason in INSTEAD:
        assert reason and any(re.search(pattern, command) for command in every), pattern


def test_documented_commands_run_in_order(newcomer, environment):
    """README first: the other pages use what it has made. What an earlier page has shown word by word runs once."""
    failed, run = [], {""}
    for page in PAGES:
        for command in commands(page):
            words, begun = stand_in(command), time.monotonic()
            if words in run:
                continue
            run.add(words)
            shell = ["bash", "-o", "pipefail", "-c", words]
            done = running.run(shell, newcomer, status=None, env=environment, stdin=subprocess.DEVNULL)
            print(f"{time.monotonic() - begun:5.1f} s  {page}: {words}")
            if done.returncode != 0:
                failed.append(f"{page}: {words}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    (snippet,) = snippets("README.md", "python")
    (newcomer / "snippet.py").write_text(snippet)
    python = [Path(environment["PATH"].split(os.pathsep)[0], "python"), "snippet.py"]
    assert "Once upon a time" in running.run(python, newcomer, env=environment).stdout
    assert not failed, "\n".join(failed)
    assert (newcomer / "mine.png").stat().st_size > 0 and (newcomer / "exported/modeling_plt.py").is_file()


# The lines of README that a newcomer types one after the other, but for these.
IN_A_CLONE = [
    (r"git clone URL plt_megatron", f"git clone --quiet {ROOT} plt_megatron", "has no address yet"),
    (r"^make venv.*", f"touch -d @0 pyproject.toml tools/make_venv.sh; ln -s {ROOT}/.venv .venv", "downloads 3 GB"),
    (r"^plt doctor.*", "", "takes ten seconds; test_doctor.py runs it"),
    (r"^pip install.*", "", "installs from the network; test_wheel.py installs"),
    (
        r"^make demo",
        "sed -i 's/400_000/8_192/; s/iters: 20/iters: 2/' configs/runs/plt2_demo.yaml; "
        "grep -q 8_192 configs/runs/plt2_demo.yaml && make demo",
        "trains for minutes",
    ),
    (r" --vocab-size 32000\b", " --vocab-size 400", "the small corpus has no 32,000 pieces"),
    (
        r"^make serve-demo",
        f"touch -d @0 serving/pyproject.toml serving/make_venv.sh; "
        f"[ ! -e {ROOT}/serving/.venv/installed ] || ln -s {ROOT}/serving/.venv serving/.venv; make serve-demo",
        "downloads vLLM, unless `make test-serving` has",
    ),
]


@pytest.mark.slow
def test_a_clone_goes_from_the_demo_to_scores_by_the_pages_alone(tmp_path):
    """Clone, demo, own text, longer runs, export, sample, scores, serving: README's own lines in one shell that stops
    where one fails. The task is that of docs/evaluation.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    until, rest = text.split("## On a Slurm cluster")[0], text.split("## To Hugging Face and back")[1]
    blocks = re.findall(r"^```bash\n(.*?)^```$", until + rest.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    script = "".join(blocks)
    for pattern, replacement, _ in IN_A_CLONE:
        assert re.search(pattern, script, re.MULTILINE), pattern
        script = re.sub(pattern, replacement, script, flags=re.MULTILINE)
    page = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    (task,) = snippets("docs/evaluation.md", "yaml")
    (line,) = re.findall(r"`(\{\"question.*?\})`", page)
    for name, content in {
        "corpus/a.jsonl": "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS),
        "tasks/reading.yaml": task,
        "tasks/reading.jsonl": f"{line}\n",
    }.items():
        (tmp_path / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / name).write_text(content)
    script = script.replace("cd plt_megatron\n", "cd plt_megatron; cp -r ../own/* .\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": str(tmp_path / "plt_megatron"), "MPLBACKEND": "Agg"}
    env |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # where torch's CPU build is
    (tmp_path / "newcomer.sh").write_text(f"set -ex\n{script}")
    done = running.run(["bash", "newcomer.sh"], tmp_path, timeout=3600, env=env)
    clone = tmp_path / "plt_megatron"
    assert '"text_completion"' in done.stdout, "the server's answer"
    assert "reading/acc" in done.stdout and (clone / "exported/evaluation.json").is_file()
    assert all((clone / "runs" / name / "metrics.jsonl").is_file() for name in ("mine", "longer", "trunk", "shorter"))
    assert (clone / ".demo/loss.png").is_file()
