"""Tokenize a corpus to `<output prefix>.bin` and `.idx` in megatron-core's indexed format.

Worker processes read and encode shards of the input on their own; finished shards are concatenated at the end.
Unfinished work is kept in `<output prefix>.partial/`: after an interruption the same command encodes only the missing
shards. The output comes with `<output prefix>.manifest.json` (what it was made from) and, if there were bad lines,
`<output prefix>.bad_lines.jsonl`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from plt_megatron.config.derived import SOURCE_PARTS
from plt_megatron.data.encoders import ChatEncoder
from plt_megatron.data.formats import Reader, open_inputs
from plt_megatron.data.indexed import concatenate, mask_path, write_index
from plt_megatron.data.plan import Plan
from plt_megatron.data.progress import ProgressBar
from plt_megatron.data.shards import FatalBadLine, PreprocessOptions, Shard, publish_json, run_in_worker, start_worker
from plt_megatron.data.tokenizer import Tokenizer, load_tokenizer
from plt_megatron.errors import UserError, printable
from plt_megatron.run_folder.checkpoints import sha256
from plt_megatron.run_folder.files import LOCK, locked, publish
from plt_megatron.run_folder.text import plural

__all__ = ["PreprocessOptions", "check_options", "preprocess", "shard_prefix"]

_VERSION = 1
_BAD_LINES_SHOWN = 10
_HASHED = 1 << 30  # bytes of input whose hashes may be lost
_LARGEST_DOCUMENT = 1 << 30  # bytes; a document's tokens are counted in an int32
_SPAWN = multiprocessing.get_context("spawn")


def shard_prefix(prefix: str, number: int, of: int) -> str:
    """Return the path prefix of the output of one of several machines."""
    return f"{prefix}.shard-{number:05d}-of-{of:05d}"


def check_options(options: PreprocessOptions) -> None:
    """Raise `UserError` if the inputs, tokenizer or settings cannot be used. Writes nothing."""
    _Job(options)


def preprocess(options: PreprocessOptions) -> dict[str, Any]:
    """Tokenize a corpus and return the manifest. Raises `UserError`; the work done so far is kept.

    Its worker processes import the main module again: a script calls this below `if __name__ == "__main__":`.
    """
    job = _Job(options)
    if (manifest := job.finished()) is not None:
        if _read_json(job.work / "plan.json") == job.identity:  # left if killed at the very end
            shutil.rmtree(job.work, ignore_errors=True)
        _say(f"{job.options.output_prefix}: already done ({manifest['tokens']:,} tokens), nothing to do")
        return manifest
    try:
        with job.locked():
            job.encode()
            manifest = job.merge()
        shutil.rmtree(job.work)
    except BrokenProcessPool as error:
        if not job.counters[3]:
            raise UserError(
                "a worker process did not start: each imports the main module again, so call preprocess() in a file, "
                'below `if __name__ == "__main__":`'
            ) from error
        raise UserError(
            "a worker process was killed (out of memory?): the same command continues where this one stopped; "
            "fewer --workers need less memory"
        ) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or options.output_prefix}: {error.strerror or error}: the same command continues "
            "where this one stopped"
        ) from error
    _report(job.options.output_prefix, manifest)
    return manifest


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


class _Job:
    """Produces one output: encodes shards in a work folder, then merges and publishes them."""

    def __init__(self, options: PreprocessOptions) -> None:
        if options.read.max_document_bytes > _LARGEST_DOCUMENT:
            raise UserError(f"--max-document-bytes {options.read.max_document_bytes} is over {_LARGEST_DOCUMENT}")
        if options.shard is not None:
            options = replace(options, output_prefix=shard_prefix(options.output_prefix, *options.shard))
        self.options = options
        self.prefix = Path(os.path.abspath(options.output_prefix))
        self.work = Path(f"{self.prefix}.partial")
        self.manifest_path = Path(f"{self.prefix}.manifest.json")
        self.sources = open_inputs(options.inputs, options.read, options.format)
        self.tokenizer: Tokenizer = load_tokenizer(options.tokenizer, options.eod_token)
        if options.eod_token is not None:
            try:
                load_tokenizer(options.tokenizer)  # as runs do, which have no such option
            except UserError as error:
                _say(f"warning: no run can load this tokenizer: {error}")
        self.identity = self._identity()
        self.plan = Plan(self.sources, options.shard_bytes, self.work, options.shard or (1, 1))
        self.counters = _SPAWN.Array("q", 4)  # done: bytes of text, tokens, bytes on disk; and workers that started

    def _identity(self) -> dict[str, Any]:
        """Return what the output depends on; a resumed or repeated command must match it."""
        identity: dict[str, Any] = {
            "version": _VERSION,
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "eod": self.tokenizer.eod if self.options.append_eod else None,
            "read": {key: value for key, value in asdict(self.options.read).items() if value is not None},
            "fail_on_bad_line": self.options.fail_on_bad_line,
            "shard_bytes": self.options.shard_bytes,
            "sources": [_stamp(source) for source in self.sources],
        }
        if self.tokenizer.spelling:
            identity["spelled"] = self.tokenizer.spelling
        if self.options.shard is not None:
            identity["shard"] = list(self.options.shard)
        if self.options.read.chat:
            encoder = ChatEncoder(self.tokenizer, append_eod=self.options.append_eod)
            identity["chat_template_sha256"] = encoder.fingerprint
        return identity

    def finished(self) -> dict[str, Any] | None:
        """Return the manifest if the requested output exists. Raises `UserError` if the files are something else."""
        names = [f"{self.prefix}.bin", f"{self.prefix}.idx"]
        names += [str(mask_path(self.prefix))] if self.options.read.chat else []
        existing = [name for name in names if os.path.exists(name)]
        if not existing:
            return None
        manifest = _read_json(self.manifest_path)
        if manifest is not None and existing == names and self._made_from_the_same(manifest):
            if os.path.getsize(f"{self.prefix}.bin") == manifest["bin_bytes"]:
                return manifest
        if self.options.overwrite or _read_json(self.work / "plan.json") == self.identity:
            return None  # or killed while publishing the output
        raise UserError(
            f"{existing[0]} exists and was not made from these inputs and settings: choose another "
            "--output-prefix or pass --overwrite"
        )

    def _made_from_the_same(self, manifest: dict[str, Any]) -> bool:
        """Return whether the manifest has these inputs and settings. A file with a new date may still be the same; that
        cannot be told of one that other machines read, too."""
        before, now = manifest.get("identity"), self.identity
        if before is None or undated(before) != undated(now):  # None: of a joined source
            return False
        stamps = zip(before["sources"], now["sources"], strict=True)
        dated = {file for file, (old, new) in enumerate(stamps) if old != new}
        own = dated & self.plan.files() if dated else dated
        return all(manifest["sources"][file]["sha256"] == sha256(Path(self.sources[file].path)) for file in own)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the work folder for this job; delete what a job with another identity left in it."""
        with locked(self.work, "plt preprocess"):
            if _read_json(self.work / "plan.json") != self.identity:
                stale = [path for path in self.work.iterdir() if path.name != LOCK]
                if stale:
                    _say("the inputs or settings changed since the interrupted run: starting over")
                for path in stale:
                    path.unlink()
                publish_json(self.work / "plan.json", self.identity)
            for leftover in [*self.work.glob(".*.*"), *self.work.glob("*.spool")]:
                leftover.unlink()
            yield

    def encode(self) -> None:
        """Encode all shards that are not done yet."""
        done = self._bytes_done()
        total = self.plan.bytes()
        if done:
            _say(f"resuming: {done / max(total, 1):.1%} of the input is already encoded")
        progress = ProgressBar(total, done)
        others = set(multiprocessing.active_children())
        given = self.options, self.work, self.counters, self.identity
        pool = ProcessPoolExecutor(self.options.workers, _SPAWN, start_worker, given)
        hasher = ThreadPoolExecutor(1)
        stop = threading.Event()
        hashing = hasher.submit(self._hash_sources, stop)
        try:
            self._run_shards(pool, progress)
            hashing.result()
            pool.shutdown()
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()  # rather than wait for their shards
            raise
        finally:
            stop.set()
            progress.close()
            pool.shutdown(wait=False, cancel_futures=True)
            hasher.shutdown(wait=False, cancel_futures=True)

    def _run_shards(self, pool: ProcessPoolExecutor, progress: ProgressBar) -> None:
        running: dict[Future[None], Shard] = {}
        shards = self.plan.shards()
        while True:
            for shard in itertools.islice(shards, self.options.workers + 2 - len(running)):
                running[pool.submit(run_in_worker, shard)] = shard
            if not running:
                return
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            text_bytes, tokens, disk_bytes = self.counters[:3]
            progress.update(disk_bytes, text_bytes, tokens)
            for future in finished:
                shard = running.pop(future)
                try:
                    future.result()
                except FatalBadLine as error:
                    raise UserError(self._describe(shard, *error.args)) from None

    def _describe(self, shard: Shard, place: int, line: int, reason: str) -> str:
        source = self.sources[shard.files[place]]
        start = shard.spans[place].start if shard.spool_start is None else shard.spool_start
        where = source.place(start, line)
        return f"{source.path}:{where}: {reason}: fix it, or pass --on-bad-line skip"

    def _hash_sources(self, stop: threading.Event) -> None:
        """Save the SHA-256 of every input that only this machine reads in the work folder, now and then and at the end:
        after each of many small files it would take longer than reading them. Returns early once `stop` is set."""
        path = self.work / "hashes.json"
        hashes, unsaved = _read_json(path) or {}, 0
        for source in (self.sources[file] for file in self.plan.whole_files()):
            if source.path not in hashes:
                digest = hashlib.sha256()
                with open(source.path, "rb") as file:
                    while block := file.read(1 << 22):
                        if stop.is_set():
                            return
                        digest.update(block)
                hashes[source.path] = digest.hexdigest()
                unsaved += source.size
            if unsaved > _HASHED:
                publish_json(path, hashes)
                unsaved = 0
        publish_json(path, hashes)

    def merge(self) -> dict[str, Any]:
        """Merge the shards, and publish the output and the manifest."""
        for source, stamp in zip(self.sources, self.identity["sources"], strict=True):
            if _stamp(source) != stamp:
                raise UserError(f"{source.path} changed while it was being read: run the command again")
        reports = self._reports()
        totals = self._totals(reports)
        if not totals["documents"] and self.options.shard is None:
            self._write_bad_lines(reports)
            left_out = f", {totals['left_out']:,} left out for their quality" if totals["left_out"] else ""
            raise UserError(
                f"no usable document in {len(self.sources)} input files ({_count_bad(totals['bad_lines'])}{left_out})"
            )
        shards = [self.work / key for key in self.plan.keys]
        sha256 = concatenate([shard.with_suffix(".bin") for shard in shards], self.work / "out")
        write_index(
            self.work / "out.index",
            self.tokenizer.dtype,
            lambda: (np.fromfile(shard.with_suffix(".len"), np.int32) for shard in shards),
        )
        hashes = _read_json(self.work / "hashes.json") or {}
        for entry in totals["sources"]:
            entry["sha256"] = hashes.get(entry["path"])  # None: other machines read it, too, or alone
        manifest = {
            "bin_bytes": os.path.getsize(self.work / "out"),
            "bin_sha256": sha256,
            "dtype": np.dtype(self.tokenizer.dtype).name,
            "tokenizer": {
                "path": str(self.tokenizer.path),
                "sha256": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
                "eod": self.tokenizer.eod,
            },
            **totals,
            "identity": self.identity,
        }
        self._write_bad_lines(reports)
        self._publish_mask(shards, reports, manifest)
        Path(f"{self.prefix}{SOURCE_PARTS}").unlink(missing_ok=True)  # of a joined source, whose tokens it names
        publish(self.work / "out", f"{self.prefix}.bin")
        publish(self.work / "out.index", f"{self.prefix}.idx")
        publish_json(self.manifest_path, manifest)
        return manifest

    def _publish_mask(
        self, shards: Sequence[Path], reports: Sequence[dict[str, Any]], manifest: dict[str, Any]
    ) -> None:
        """Merge the loss masks of conversations; for other text, delete a mask that an earlier output left."""
        target = mask_path(self.prefix)
        if not self.options.read.chat:
            target.unlink(missing_ok=True)
            return
        manifest["loss_mask_sha256"] = concatenate([shard.with_suffix(".mask") for shard in shards], self.work / "mask")
        manifest["loss_mask_tokens"] = sum(report["counted"] for report in reports)
        publish(self.work / "mask", target)

    def _reports(self) -> list[dict[str, Any]]:
        """Return the reports of all spans, in output order. Raises `UserError` if a shard does not match its report."""
        reports: list[dict[str, Any]] = []
        for key in self.plan.keys:
            shard = _read_json(self.work / f"{key}.json")
            tokens = (self.work / f"{key}.bin").stat().st_size // np.dtype(self.tokenizer.dtype).itemsize
            mask = self.work / f"{key}.mask"
            whole = not self.options.read.chat or (mask.exists() and mask.stat().st_size == tokens)
            if shard is None or not whole or sum(report["tokens"] for report in shard) != tokens:
                (self.work / f"{key}.json").unlink(missing_ok=True)
                raise UserError(f"{self.work / key}.bin is damaged: run the same command again to redo it")
            reports += shard
        return reports

    def _totals(self, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sum up documents, tokens and bad lines, for each source and for all."""
        keys = ("documents", "tokens", "text_bytes", "lines", "left_out")
        entries: list[dict[str, Any]] = [
            {"path": source.path, "bytes": source.size, **dict.fromkeys(keys, 0), "bad_lines": Counter()}
            for source in self.sources
        ]
        for report in reports:
            entry = entries[report["file"]]
            for key in keys:
                entry[key] += report.get(key, 0)  # shards of earlier versions have no `left_out`
            entry["bad_lines"].update(report["bad"])
        bad: Counter[str] = sum((entry["bad_lines"] for entry in entries), Counter())
        totals = {key: sum(entry[key] for entry in entries) for key in keys}
        return {**totals, "bad_lines": bad, "sources": entries}

    def _bad_lines(self, reports: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int, str]]:
        """Yield file, line (Parquet: row) and reason of the bad lines kept."""
        before: Counter[int] = Counter()
        file, start = self.plan.first()
        if start and any(report["bad_lines"] for report in reports if report["file"] == file):
            before[file] = self.sources[file].lines_before(start)
        for report in reports:
            for line, reason in report["bad_lines"]:
                yield self.sources[report["file"]].path, before[report["file"]] + line, reason
            before[report["file"]] += report["lines"]

    def _write_bad_lines(self, reports: Sequence[dict[str, Any]]) -> None:
        """List the bad lines in `prefix`.bad_lines.jsonl (no file if there are none) and show the first few."""
        path = Path(f"{self.prefix}.bad_lines.jsonl")
        path.unlink(missing_ok=True)
        kept = sum(len(report["bad_lines"]) for report in reports)
        if not kept:
            return
        with open(path, "w", encoding="utf-8") as file:
            for number, (source, line, reason) in enumerate(self._bad_lines(reports)):
                file.write(json.dumps({"file": source, "line": line, "reason": reason}) + "\n")
                if number < _BAD_LINES_SHOWN:
                    _say(f"bad line {source}:{line}: {reason}")
        total = sum(sum(report["bad"].values()) for report in reports)
        if total > _BAD_LINES_SHOWN:
            listed = "all" if total == kept else f"the first of each shard, {kept:,} of {total:,},"
            _say(f"... {listed} are in {path}")

    def _bytes_done(self) -> int:
        """Return the bytes of the input whose shards an earlier run finished."""
        done = [_read_json(path) for path in self.work.glob("[0-9]*.json")]
        return sum(report["disk_bytes"] for shard in done for report in shard or [])


def undated(identity: dict[str, Any]) -> dict[str, Any]:
    """Return a job's identity without the dates of its inputs: a file that was touched may still be the same."""
    return {**identity, "sources": [stamp[:3] for stamp in identity.get("sources", ())]}


def _stamp(source: Reader) -> list[Any]:
    status = os.stat(source.path)
    return [os.path.abspath(source.path), source.name, status.st_size, status.st_mtime_ns]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _count_bad(bad: Counter[str]) -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(bad.items()))
    return f"{sum(bad.values()):,} bad lines: {kinds}" if bad else "no bad lines"


def _report(prefix: str, manifest: dict[str, Any]) -> None:
    bad, left_out = manifest["bad_lines"], manifest["left_out"]
    _say(
        f"{prefix}.bin/.idx: {plural(manifest['documents'], 'document')}, {manifest['tokens']:,} tokens "
        f"({manifest['dtype']}); {'skipped ' if bad else ''}{_count_bad(bad)}"
        + (f"; {plural(left_out, 'document')} left out for their quality" if left_out else "")
        + (f"; {manifest['loss_mask_tokens']:,} tokens count in the loss" if "loss_mask_tokens" in manifest else "")
    )
