"""What libraries of remote storage say when they fail, in one line and without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from plt_megatron.errors import UserError

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL|KEY|SAS", re.IGNORECASE)
# Tokens of a hub, users and passwords in a URL, and its query, in which signatures are.
_SECRET = re.compile(r"hf_\w{8,}|(?<=://)[^/\s@]+@|(?<=\w)\?\S*[=&]\S*")
_SHORTEST = 6  # characters of a secret: shorter words are in every message
_LONGEST = 300  # characters of a message


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Any error of a library in the block becomes a `UserError`: "`what`: reason"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own, and they share no class
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in one line, without the secrets that this process has been given in its environment."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, KeyError | IndexError | AttributeError | TypeError):  # says little without its class
        text = f"{type(error).__name__}: {text}"
    return redacted(text)[:_LONGEST]


def redacted(text: str) -> str:
    """A text without secrets."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _SECRET.sub("***", text)
