"""Quotes text for shell scripts: user input never becomes code."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

from plt_megatron.errors import UserError

_VARIABLE = re.compile(r"\$(\{[A-Za-z_][A-Za-z0-9_]*\}|[A-Za-z_][A-Za-z0-9_]*)")
# Special within double quotes.
_SPECIAL = re.compile(r'([\\"`$])')


def literal(text: str) -> str:
    """A shell word for `text`, whatever it contains."""
    return shlex.quote(text)


def expandable(text: str) -> str:
    """A shell word for `text` in which `$NAME` and `${NAME}` are expanded, and nothing else is."""
    if not _VARIABLE.search(text):
        return literal(text)
    parts, end = [], 0
    for match in _VARIABLE.finditer(text):
        parts += [_SPECIAL.sub(r"\\\1", text[end : match.start()]), match[0]]
        end = match.end()
    parts.append(_SPECIAL.sub(r"\\\1", text[end:]))
    return '"' + "".join(parts) + '"'


def variables(text: str) -> list[str]:
    """The names that `expandable` expands in `text`, each once."""
    return list(dict.fromkeys(match[1].strip("{}") for match in _VARIABLE.finditer(text)))


def directive(option: str, value: str | int | None = None) -> str:
    """An `#SBATCH` line. sbatch knows quotes as the shell does, but every backslash escapes, also within quotes.

    Raises:
        UserError: a value that such a line cannot contain.
    """
    if value is None:
        return f"#SBATCH {option}"
    check_one_line(str(value), option)
    if "\\" in str(value):
        raise UserError(f"{option}: a job script cannot contain a backslash, got {value}")
    return f"#SBATCH {option}={literal(str(value))}"


def check_one_line(text: str, what: str) -> None:
    """Raise `UserError` where `text` holds line breaks or other control characters."""
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise UserError(f"{what} must not contain line breaks or control characters, got {text!r}")


def syntax_problems(script: str) -> list[str]:
    """What bash cannot read in a script, in one line: `line 2: syntax error near unexpected token ...`; nothing where
    there is no bash to ask."""
    if not script or shutil.which("bash") is None:
        return []
    done = subprocess.run(["bash", "-n", "/dev/stdin"], input=script, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("/dev/stdin: ") for line in done.stderr.splitlines()]
    return lines[:1]  # the next ones quote it, or follow from it
