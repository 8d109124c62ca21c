"""Print a script that completes plt's commands, options, configuration keys and files in a shell.

    plt completion bash > ~/.plt_completion    # and in ~/.bashrc: source ~/.plt_completion
    plt completion zsh > ~/.plt_completion     # and in ~/.zshrc, after compinit: source ~/.plt_completion

The script matches this version: print it again after an update.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator

from plt_megatron.commands import COMMANDS, CommandParser, command, load

# `_plt_words COMMAND WORD` prints the candidates for WORD; an empty COMMAND stands for plt's first argument.
_WORDS = """\
_plt_words() {{
    case "$1 $2" in
{cases}
    esac
}}
"""
_FRONT = {
    "bash": """\
_plt() {
    local command=
    [[ $3 != = ]] || return 0  # a setting's value: bash takes = for the end of a word
    [[ $COMP_CWORD -eq 1 ]] || command=${COMP_WORDS[1]}
    mapfile -t COMPREPLY < <(compgen -W "$(_plt_words "$command" "$2")" -- "$2")
    [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace
}
complete -o bashdefault -o default -F _plt plt
""",
    "zsh": """\
_plt() {
    local command=
    if compset -P '*='; then  # a setting's value
        _files
        return
    fi
    (( CURRENT == 2 )) || command=$words[2]
    local -a offered=($(_plt_words "$command" "$PREFIX"))
    compadd -S '' -- ${(M)offered:#*=} || compadd -- ${offered:#*=} || _files
}
compdef _plt plt
""",
}


def _arguments(parser: CommandParser) -> None:
    parser.add_argument("shell", choices=sorted(_FRONT))


@command("completion", __doc__, _arguments)
def main(arguments: argparse.Namespace) -> None:
    cases = "\n".join(f"        {pattern}) echo '{' '.join(words)}' ;;" for pattern, words in _cases())
    print(_WORDS.format(cases=cases) + _FRONT[arguments.shell], end="")


def _cases() -> Iterator[tuple[str, list[str]]]:
    """Yield patterns of `COMMAND WORD`, each with its completions."""
    from plt_megatron.config.loader import all_keys
    from plt_megatron.config.schema import RunConfig

    yield '" "*', [*COMMANDS, "--help", "--version"]
    take_keys = []
    for name in COMMANDS:
        shown = _help(name)
        yield f'"{name} -"*', re.findall(r"^  (?:-\w, )?(--[\w-]+)", shown, re.MULTILINE)
        if "key=value" in shown:
            take_keys.append(name)
    yield " | ".join(f'"{name} "?*' for name in take_keys), [f"{key}=" for key in all_keys(RunConfig)]


def _help(name: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        load(name).main(["--help"])
    return shown.getvalue()
