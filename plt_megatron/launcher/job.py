"""`job.yaml` of a run folder: what the job was given, for those who read it in the job and afterwards."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plt_megatron.errors import UserError

FILE_NAME = "job.yaml"
SCRIPT_NAME = "job.sbatch"
CODE_NAME = "code"
LOGS_NAME = "logs"
SUBMISSIONS_NAME = "submissions.jsonl"


@dataclass(frozen=True)
class JobSettings:
    """What a run's Slurm job asks for, and how it treats failures."""

    job_name: str  # of the single job; in an array the jobs carry the array's name
    nodes: int
    processes_per_node: int
    cpus_per_process: int
    gpus_per_node: int  # 0: a CPU cluster
    time_limit_seconds: int
    python: str  # interpreter of the ranks; inside the container, if there is one
    signal_margin_seconds: int = 300  # how long before the time limit the job is told to save
    requeue: bool = False
    chain: int = 1  # jobs that follow one another, each when the one before has ended
    max_restarts: int = 1  # inside one allocation
    max_exclusions: int = 2  # nodes the job may be requeued without
    max_requeues_without_progress: int = 1  # further attempts that made no step end the run
    cluster: str | None = None
    scratch: str | None = None  # TMPDIR of the job on each node; $NAMES in it are the node's
    environment: dict[str, str] = field(default_factory=dict)  # network and other variables of the profile

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.processes_per_node


def save_settings(settings: JobSettings, run: Path) -> None:
    """Write `RUN/job.yaml`."""
    (run / FILE_NAME).write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), encoding="utf-8")


def load_settings(run: Path) -> JobSettings:
    """Read `RUN/job.yaml`.

    Raises:
        UserError: it is missing, no YAML, or a setting is unknown, missing or of the wrong type.
    """
    path = run / FILE_NAME
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; launch/submit.py writes it") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    return read_dataclass(JobSettings, values, str(path))


def read_dataclass[T](cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a mapping, each value checked against its field's type (scalars, lists, dicts, dataclasses).

    Raises:
        UserError: naming `where` and the key.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected `key: value` lines")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, cls))}
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]}; known: {', '.join(fields)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(hint, value, where)
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, where) for item in value]
    if origin is dict and isinstance(value, dict):
        # YAML reads `NCCL_DEBUG: 1` as a number; an environment variable is text.
        return {str(key): _text(item, f"{where}.{key}") for key, item in value.items()}
    if origin is typing.Literal and value in arguments:
        return value
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, where)
    if isinstance(hint, type) and type(value) is hint:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) in (int, float):
        return str(value)
    raise UserError(f"{where}: expected {_name(hint)}, got {value!r}")


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: expected text; put quotes around {value!r}")
    return str(value)


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return names.get(hint, {list: "a list", dict: "a mapping"}.get(typing.get_origin(hint) or hint, "a mapping"))
