#!/usr/bin/env python3
"""Tokenization speed and memory, compared with the plain way and with the tokenizer alone.

The plain way, as in most training code bases: a pool of processes encodes one document at a time, and the parent
process writes the results (megatron-core's IndexedDatasetBuilder). Documents, tokenizer and number of workers are the
same, repetitions are interleaved, figures are medians, and both outputs must be the same bytes. Exits with status 1
when a bar is missed:

  speed    >= 2x the tokens/s of the plain way
  encode   >= 80 % of the rate of the tokenizer's own batch encoding (sentencepiece, as many threads as workers)
  memory   1 GB of text in under 2 GB, of all processes together, and flat: at most 1.5x of that for an eighth of it
  nodes    >= 0.9 x N times the speed of one node on N (`--shard`, `--join`); a node is a core, at most four
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def python_sources() -> Iterator[str]:
    """Yield the texts of this interpreter's and its packages' Python files, in a fixed order."""
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib"))
    for folder in folders:
        for path in sorted(Path(folder).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip() and len(text) < 1 << 20:
                yield text


def write_corpus(path: Path, size: int) -> int:
    """Write at least `size` bytes of JSONL, repeating texts if the machine has fewer; return the bytes before gzip."""
    written = 0
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else open(path, "wb") as file:
        while written < size:
            for text in python_sources():
                line = json.dumps({"text": text}).encode() + b"\n"
                file.write(line)
                written += len(line)
                if written >= size:
                    break
    return written


# The plain way.

_processor: Any = None


def _start_plain_worker(model: str) -> None:
    import sentencepiece

    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_plain(line: str) -> tuple[list[int], int]:
    ids = _processor.encode(json.loads(line)["text"])
    ids.append(_processor.eos_id())
    return ids, len(line)


def plain(corpus: Path, model: Path, prefix: str, workers: int) -> float:
    """Preprocess in the plain way; return the seconds, including the start of the pool."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    started = time.perf_counter()
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, _start_plain_worker, (str(model),)) as pool, open(corpus, encoding="utf-8") as lines:
        for ids, _ in pool.imap(_encode_plain, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(prefix + ".idx")
    return time.perf_counter() - started


# Ours, and a breakdown of its time.


def ours(corpus: Path, model: Path, prefix: str, workers: int) -> float:
    """Run `preprocess`; return the seconds, including worker start, hashes, merge and manifest."""
    from plt_megatron.data.preprocess import PreprocessOptions, preprocess

    started = time.perf_counter()
    shard_bytes = min(64 << 20, max(1 << 20, corpus.stat().st_size // (4 * workers)))
    preprocess(PreprocessOptions([str(corpus)], prefix, str(model), workers, shard_bytes=shard_bytes))
    return time.perf_counter() - started


def batch_encode(texts: list[str], model: Path, workers: int) -> float:
    """Encode texts in memory by sentencepiece's batch encoding; return the seconds."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    started = time.perf_counter()
    processor.encode(texts, out_type="numpy", num_threads=workers)
    return time.perf_counter() - started


def breakdown(corpus: Path, model: Path, folder: Path) -> dict[str, float]:
    """Return the CPU seconds of each phase in one process."""
    from plt_megatron.data.encoders import TextEncoder
    from plt_megatron.data.formats import ReadOptions, Span, open_inputs
    from plt_megatron.data.indexed import concatenate
    from plt_megatron.data.shards import PreprocessOptions, Shard, encode_shard
    from plt_megatron.data.tokenizer import load_tokenizer

    span = Span(open_inputs([str(corpus)], ReadOptions())[0])
    options = PreprocessOptions([str(corpus)], "", str(model))
    counters = multiprocessing.Array("q", 3)
    seconds = {}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        seconds[name] = time.process_time() - started
        return result

    documents = phase("read and parse", lambda: list(span.documents()))
    texts = [document.text for document in documents]
    tokenizer = phase("load the tokenizer", lambda: load_tokenizer(model))
    phase("encode, empty cache", lambda: tokenizer.encode_flat(texts))
    phase("encode, full cache", lambda: tokenizer.encode_flat(texts))
    shard = Shard("0", (span,), (0,))
    encoder = TextEncoder(load_tokenizer(model), append_eod=True)
    phase("a shard, all in all", lambda: encode_shard(shard, options, encoder, folder, counters))
    phase("merge", lambda: concatenate([folder / "0.bin"], folder / "merged"))
    return seconds


# Nodes.


def on_nodes(folder: Path, corpus: Path, model: Path, nodes: int) -> float:
    """Preprocess on simulated nodes, each a process on a core of its own, and join the parts; return the seconds."""
    prefix, cores = str(folder / f"nodes{nodes}"), sorted(os.sched_getaffinity(0))
    tool = [sys.executable, str(ROOT / "tools" / "preprocess.py"), "--output-prefix", prefix]
    encode = [*tool, "--input", str(corpus), "--tokenizer", str(model), "--workers", "1", "--shard-mb", "4"]
    commands = [[*encode, "--shard", f"{number}/{nodes}"] for number in range(1, nodes + 1)] if nodes > 1 else [encode]
    started = time.perf_counter()
    running = []
    for core, command in zip(cores, commands, strict=False):
        pin = functools.partial(os.sched_setaffinity, 0, {core})
        running.append(subprocess.Popen(command, preexec_fn=pin, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"{' '.join(encode)} failed")
    if nodes > 1:
        subprocess.run([*tool, "--join", f"{prefix}.shard-*"], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    for path in folder.glob(f"nodes{nodes}.*"):
        path.unlink()
    return seconds


def speed_on_nodes(folder: Path, size: int, model: Path, nodes: int, repeats: int) -> float:
    """Return how many times as fast `nodes` nodes are as one: the median of ratios of neighbors in time.

    `size` is the corpus's in bytes. Starting processes and joining parts takes one to two seconds at any size.
    """
    corpus = folder / "nodes.jsonl"
    write_corpus(corpus, size)
    ratios = [on_nodes(folder, corpus, model, 1) / on_nodes(folder, corpus, model, nodes) for _ in range(repeats)]
    corpus.unlink()
    return statistics.median(ratios)


# Memory.


def peak_memory(command: list[str]) -> tuple[int, float]:
    """Run a command; return the peak of its processes' summed resident memory, in bytes, and the seconds."""
    import psutil

    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parent = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            for member in [parent, *parent.children(recursive=True)]:
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read() if process.stderr else ''}")
    return peak, time.perf_counter() - started


def memory(folder: Path, model: Path, size: int, workers: int) -> tuple[int, float]:
    """Return peak bytes and seconds of preprocessing a corpus of `size` bytes, a quarter of it in a .gz file."""
    parts = [folder / "memory.jsonl", folder / "memory.jsonl.gz"]
    write_corpus(parts[0], size * 3 // 4)
    write_corpus(parts[1], size // 4)
    command = [sys.executable, str(ROOT / "tools" / "preprocess.py"), "--input", *map(str, parts)]
    command += ["--tokenizer", str(model), "--output-prefix", str(folder / f"memory{size}"), "--overwrite"]
    result = peak_memory([*command, "--workers", str(workers)])
    for path in parts:
        path.unlink()
    return result


# The report.


def speed(folder: Path, arguments: argparse.Namespace, model: Path, corpus: Path) -> dict[str, float]:
    """Return median tokens/s of the three ways, and median ratios of neighbors in time (`speedup`, `share`)."""
    from plt_megatron.data.indexed import read_index

    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    times: dict[str, list[float]] = {"plain": [], "ours": [], "batch": []}
    for repeat in range(arguments.repeats):
        for name in ("plain", "ours"):
            for suffix in (".bin", ".idx", ".manifest.json"):
                Path(f"{folder / name}{suffix}").unlink(missing_ok=True)
        spent = []
        for name, work in (
            ("plain", lambda: plain(corpus, model, str(folder / "plain"), arguments.workers)),
            ("ours", lambda: ours(corpus, model, str(folder / "ours"), arguments.workers)),
            ("batch", lambda: batch_encode(texts, model, arguments.workers)),
        ):
            before = sum(os.times()[:4])
            times[name].append(work())
            spent.append(f"{name} {times[name][-1]:.2f} s ({sum(os.times()[:4]) - before:.1f} s of CPU)")
        print(f"  repetition {repeat + 1}: {', '.join(spent)}", flush=True)
    for suffix in (".bin", ".idx"):
        if Path(f"{folder / 'plain'}{suffix}").read_bytes() != Path(f"{folder / 'ours'}{suffix}").read_bytes():
            raise SystemExit(f"the two {suffix} files differ")
    tokens = read_index(folder / "ours").tokens
    rates = {name: tokens / statistics.median(values) for name, values in times.items()}
    speedups = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
    shares = [a / b for a, b in zip(times["batch"], times["ours"], strict=True)]
    return {**rates, "speedup": statistics.median(speedups), "share": statistics.median(shares), "tokens": tokens}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--mb", type=int, default=96, help="size of the corpus for speed")
    parser.add_argument("--memory-mb", type=int, default=1000, help="size of the corpus for memory; 0: no memory test")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plt_preprocess_"))
    try:
        figures, bars = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    for name, value, bar, met in bars:
        print(f"{'ok    ' if met else 'MISSED'} {name}: {value} (bar: {bar})")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if all(met for *_, met in bars) else 1


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[tuple[str, str, str, bool]]]:
    """Return all figures, and the bars as (name, value, bar, met)."""
    from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer

    corpus = folder / "corpus.jsonl"
    size = write_corpus(corpus, arguments.mb * 1_000_000)
    options = TrainingOptions(
        [str(corpus)], str(folder), arguments.vocab_size, arguments.model_type, max_sample_bytes=32 << 20
    )
    result = train_tokenizer(options)
    print(f"corpus: {size / 1e6:.1f} MB of Python sources; {result.summary}")
    figures: dict[str, Any] = {"workers": arguments.workers, "model_type": arguments.model_type, "corpus_bytes": size}
    rates = speed(folder, arguments, result.model, corpus)
    figures |= rates
    for name, label in (
        ("plain", "one document at a time"),
        ("ours", "plt preprocess"),
        ("batch", "batch encode alone"),
    ):
        rate = rates[name]
        print(f"  {label:24} {rate / 1e6:6.2f}M tokens/s  {rate * size / rates['tokens'] / 1e6:6.1f} MB/s")
    figures["seconds"] = breakdown(corpus, result.model, folder)
    print(
        "  one process, CPU time: " + ", ".join(f"{name} {value:.2f} s" for name, value in figures["seconds"].items())
    )
    bars = [
        ("speed", f"{rates['speedup']:.2f}x the plain way", ">= 2x", rates["speedup"] >= 2),
        ("encode", f"{rates['share']:.0%} of the batch-encode rate", ">= 80 %", rates["share"] >= 0.8),
    ]
    nodes = min(4, len(os.sched_getaffinity(0)))
    gained = speed_on_nodes(folder, 4 * size, result.model, nodes, arguments.repeats)
    figures["nodes"] = {"nodes": nodes, "speedup": gained}
    bars.append(("nodes", f"{gained:.2f}x one node's speed on {nodes}", ">= 0.9 x nodes", gained >= 0.9 * nodes))
    if arguments.memory_mb:
        small, _ = memory(folder, result.model, arguments.memory_mb * 125_000, arguments.workers)
        large, seconds = memory(folder, result.model, arguments.memory_mb * 1_000_000, arguments.workers)
        figures |= {"memory_small": small, "memory_large": large, "memory_seconds": seconds}
        print(
            f"  memory: {arguments.memory_mb / 8:,.0f} MB of text in {small / 1e6:,.0f} MB, "
            f"{arguments.memory_mb:,} MB in {large / 1e6:,.0f} MB ({seconds:.0f} s)"
        )
        bars.append(("memory", f"{large / 1e6:,.0f} MB", "< 2 GB", large < 2e9))
        bars.append(("flat", f"{large / small:.2f}x of an eighth's", "<= 1.5x", large <= 1.5 * small))
    return figures, bars


if __name__ == "__main__":
    sys.exit(main())
