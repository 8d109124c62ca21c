"""The random search: `make fuzz`, or `python -m tests.fuzz --seed 1 --minutes 60`.

    python -m tests.fuzz --seed 1 --kinds parity --first 17 --cases 1     case 17 of seed 1 again
    python -m tests.fuzz --kinds parity model.loop_count=3 ...            one configuration, as a finding names it

Exit status: 0 nothing found, 1 something.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections import Counter
from contextlib import closing

import yaml

from tests.distributed.pool import WorkerPool
from tests.fuzz import data, draw, search
from tests.fuzz.branch import Branch
from tests.fuzz.parity import Parity
from tests.fuzz.refusals import Refusals
from tests.fuzz.rehearsal import Rehearsal
from tests.fuzz.resume import Resume
from tests.fuzz.round_trip import RoundTrip
from tests.fuzz.te_layers import Fp8, TransformerEngine
from tests.te import emulation

KINDS: dict[str, type[search.Kind]] = {
    kind.name: kind for kind in (Parity, Refusals, Resume, RoundTrip, Branch, Rehearsal, TransformerEngine, Fp8)
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Search for faults at random.")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="try one configuration instead of drawing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, help="of each kind; default: as many as there is time for")
    parser.add_argument("--minutes", type=float, help="begin no case after so many; default: all cases, or 10 minutes")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help="separated by commas; default: all, " + ", ".join(KINDS)
    )
    parser.add_argument("--no-shrink", action="store_true", help="name findings as they were drawn")
    arguments = parser.parse_args()
    data.make()
    with closing(WorkerPool()) as cpu, closing(WorkerPool("tests.te.emulation:enter")) as te:
        return _search(arguments, _kinds(arguments.kinds.split(","), cpu, te))


def _search(arguments: argparse.Namespace, kinds: dict[str, search.Kind]) -> int:
    minutes = arguments.minutes or (10.0 if arguments.cases is None else float("inf"))
    deadline, counts, findings = time.monotonic() + 60 * minutes, Counter[str](), 0
    told = time.monotonic()
    for name in _turns(arguments, kinds):
        if time.monotonic() > deadline:
            break
        kind, number = kinds[name], arguments.first + counts[name]
        counts[name] += 1
        if arguments.settings:
            case, settings = name, _given(arguments.settings) | dict(kind.fixed)
        else:
            case, settings = f"seed {arguments.seed}, {name} {number}", kind.draw(arguments.seed, number)
        noted = sum(kind.notes.values())
        found = search.find(kind, settings, case, shrink_s=0 if arguments.no_shrink or arguments.settings else 300)
        if sum(kind.notes.values()) > noted:
            print(case, file=sys.stderr, flush=True)
        if found is not None:
            findings += 1
            print(f"FOUND in {found.case}: {found.problem}\n{command(name, kind, found)}\n", flush=True)
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(_state(counts, kinds, findings), file=sys.stderr, flush=True)
    print(_state(counts, kinds, findings))
    return int(findings > 0)


def _kinds(names: list[str], cpu: WorkerPool, te: WorkerPool) -> dict[str, search.Kind]:
    """Those that this machine can try, with the pool that each needs; what the others lack is said."""
    kinds: dict[str, search.Kind] = {}
    for name in names:
        on_te = issubclass(KINDS[name], TransformerEngine)
        if on_te and (why := emulation.find()) is not None:
            print(f"no cases of {name}: {why}", file=sys.stderr)
        else:
            kinds[name] = KINDS[name](te if on_te else cpu)
    return kinds


def _turns(arguments: argparse.Namespace, kinds: dict[str, search.Kind]) -> itertools.chain[str]:
    """Which kind each case is of: cheap kinds more often, unless their number is given."""
    if arguments.settings:
        return itertools.chain(kinds)
    if arguments.cases is not None:
        return itertools.chain.from_iterable(itertools.repeat(list(kinds), arguments.cases))
    often = [name for name, kind in kinds.items() for _ in range(kind.often)]
    return itertools.chain.from_iterable(itertools.repeat(often))


def _given(settings: list[str]) -> draw.Settings:
    return {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}


def command(name: str, kind: search.Kind, found: search.Finding) -> str:
    """The command that shows the finding again."""
    told = {key: value for key, value in found.shortest.items() if key not in kind.fixed}
    given = [shlex.quote(setting) for setting in draw.overrides(told)]
    return " ".join(["python -m tests.fuzz --kinds", name, *given])


def _state(counts: Counter[str], kinds: dict[str, search.Kind], findings: int) -> str:
    done = ", ".join(f"{number} {name}" for name, number in counts.items())
    notes = [f"{name}: {why} ({number})" for name, kind in kinds.items() for why, number in kind.notes.items()]
    return "; ".join([f"{done}: {findings or 'nothing'} found", *notes])


if __name__ == "__main__":
    sys.exit(main())
