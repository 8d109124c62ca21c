"""The command `plt`: one module per subcommand, with its arguments and a `main` that returns the exit status.

`GROUPS` lists the commands; a module is imported only when its command is given. `python -m plt_megatron` is `plt`, and
the scripts of launch/ and tools/ start it from a checkout.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import keyword
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any, NoReturn

import plt_megatron
from plt_megatron.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    hear_every_interrupt,
    prepare_streams,
    print_error,
    run_command,
)

# What `plt --help` shows.
GROUPS = {
    "set up": {
        "doctor": "show what this machine can run, and what is missing for the rest",
        "completion": "print a completion script for bash or zsh",
        "config": "rename old settings in configuration files of earlier versions",
    },
    "train": {
        "demo": "train a small PLT and its one-loop baseline on text this machine has",
        "train": "train a configuration on this machine",
        "average": "average the weights of checkpoints",
    },
    "data": {
        "train-tokenizer": "train a tokenizer",
        "preprocess": "tokenize a corpus",
        "inspect-data": "show what a run's batches hold; find validation text in the training data",
    },
    "convert and serve": {
        "export": "write a checkpoint as a Hugging Face model",
        "import": "convert a Hugging Face model to a checkpoint, as it is or as the start of a PLT",
        "generate": "continue a text with an exported model",
        "evaluate": "run lm-evaluation-harness tasks on an exported model",
        "upload": "send exports and checkpoints to a bucket, a folder or a hub",
    },
    "experiments": {
        "sweep": "train variants of one model: loop counts, ablation rows, sizes, seeds",
        "report": "compare the runs of a sweep, with error bars",
        "study": "find out which loop count to train, in rounds of small runs",
        "archive": "pack the records of a sweep or study into one file",
    },
    "cluster": {
        "submit": "train configurations on a Slurm cluster",
        "status": "show runs: states, steps, speed, time left",
        "estimate": "calculate a run's parameters, FLOPs, memory, traffic and time",
        "rehearse": "rehearse a large job here, without a GPU",
    },
    "inspect": {
        "plot": "plot what runs recorded",
        "diagnose": "measure what each loop of a trained model does",
        "check-coordinates": "check that activations keep their size over width, depth and loops",
    },
}
COMMANDS = {name: summary for group in GROUPS.values() for name, summary in group.items()}


class CommandParser(argparse.ArgumentParser):
    """Argument parser of `plt NAME`, with `--version`."""

    def __init__(self, name: str, **options: Any) -> None:
        if "\n" in options["description"]:
            options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"plt {name}".strip(), **options)
        self.add_argument("--version", action="version", version=f"plt-megatron {plt_megatron.__version__}")

    def add_config(self, example: str = "model.loop_count=3", nargs: str | None = None) -> None:
        """Add a run's configuration, `config`, and settings to change, `overrides`."""
        self.add_argument("config", nargs=nargs, metavar="CONFIG.yaml", help="a run configuration, as in configs/runs")
        self.add_argument("overrides", nargs="*", metavar="key=value", help=f"a setting to change, as in {example}")

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does; an argument that is not UTF-8 is an error."""
        prepare_streams()
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError:
                self.error(f"the argument {word!a} is not UTF-8 text")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line, like every other error, instead of the usage, and exit with status 2."""
        print_error(f"{' '.join(message.split())}; see {self.prog} --help")
        sys.exit(EXIT_USER_ERROR)


def command(
    name: str,
    description: str | None,
    add_arguments: Callable[[CommandParser], None],
    *,
    interrupted: str = "interrupted",
) -> Callable[[Callable[[argparse.Namespace], int | None]], Callable[[Sequence[str]], int]]:
    """Return the decorator that makes a function of the parsed arguments a command's `main`.

    The function returns the exit status or, for 0, None. An `argparse.ArgumentError` that it raises ends like any other
    error in the arguments. `interrupted`: the line that Ctrl-C prints.
    """

    def of(work: Callable[[argparse.Namespace], int | None]) -> Callable[[Sequence[str]], int]:
        def main(argv: Sequence[str]) -> int:
            parser = CommandParser(name, description=description)
            add_arguments(parser)
            arguments = parser.parse_intermixed_args(argv)
            try:
                return run_command(lambda: work(arguments), interrupted)
            except argparse.ArgumentError as error:
                parser.error(str(error))

        return main

    return of


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return the `type` of an option that is a whole number from `least` to `most`; None: any from `least` on."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limit = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value:,}")
        return value

    convert.__name__ = "int"  # argparse names it where a text is no number
    return convert


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """Return the arguments that are fields of `options`, a dataclass."""
    names = {field.name for field in dataclasses.fields(options)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return load(words[0]).main(words[1:])
    parser = CommandParser("", description=_map(), usage="plt COMMAND [ARGUMENTS]")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    given = parser.parse_args(words[:1]).command
    if given is None:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    parser.error(f"there is no command {given!r}{_nearest(given)}")


def load(name: str) -> ModuleType:
    """Import and return a command's module: inspect_data for inspect-data, import_ for import."""
    module = name.replace("-", "_") + "_" * keyword.iskeyword(name)
    return importlib.import_module(f"{__name__}.{module}")


def _map() -> str:
    """Return the description of `plt`: its commands by group."""
    lines = ["Pretrain Parallel Loop Transformers on megatron-core. `plt COMMAND --help` shows a command's arguments."]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:18} {summary}" for name, summary in commands.items())]
    return "\n".join(lines)


def _nearest(given: str) -> str:
    import difflib

    found = difflib.get_close_matches(given, COMMANDS, n=1, cutoff=0.4)
    return f": did you mean plt {found[0]}?" if found else ""


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End without a traceback on Ctrl-C while a command's modules are imported; later, `errors.run_command` does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(EXIT_INTERRUPTED)


sys.excepthook = _end_quietly
hear_every_interrupt()
