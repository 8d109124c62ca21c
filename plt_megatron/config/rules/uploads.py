"""Rules for the form of upload destinations (`checkpoint.uploads`, `checkpoint.exports`).

`storage` checks before training whether they can be written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import first_line

HUB = "hf"
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")
_PASSWORD = re.compile(r"://[^/\s@]*:(?!\d+/)\S*@")  # after a port there is no @, in a password there may be a slash
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_MODELS_INSTEAD = {
    "checkpoint.uploads.to": "give a bucket or folder (checkpoint.exports.upload_to takes a hub)",
    "checkpoint.load": "plt import converts a downloaded model",
}
_MARKS = ("::", "?", "#", "*")  # fsspec's own, or a pattern's
_EXAMPLES = "such as s3://bucket/folder, file:///folder or hf://owner/name"


def is_url(text: str) -> bool:
    """Return whether the text is a URL instead of a path on this machine."""
    return "://" in text


def protocol_of(url: str) -> str:
    """Return the protocol of a URL: `s3` for `s3://bucket/folder`."""
    return url.partition("://")[0]


def exports_of(config: RunConfig) -> str | None:
    """Return the destination of a run's exports, its own folder or a repository; None if they are not uploaded."""
    to = None if config.checkpoint.exports is None else config.checkpoint.exports.upload_to
    return to if to is None or protocol_of(to) == HUB else f"{to.rstrip('/')}/{config.name}"


def checkpoints_of(config: RunConfig) -> str | None:
    """Return the run's folder at the destination of checkpoints; None if they are not uploaded."""
    uploads = config.checkpoint.uploads
    return None if uploads is None else f"{uploads.to.rstrip('/')}/{config.name}"


def url_problem(url: str) -> str | None:
    """Return what is wrong with the form of a URL; None if nothing is. Secrets in it are not repeated."""
    if _PASSWORD.search(url):
        return "it contains a password, which belongs in the environment or its library's own configuration"
    match = _URL.fullmatch(url)
    if match is None:
        return f"{url} is not a URL, {_EXAMPLES}"
    protocol, rest = match.groups()
    if any(mark in url for mark in _MARKS):
        return f"{protocol}://... contains one of {' '.join(_MARKS)}; give a plain URL, {_EXAMPLES}"
    if not rest.strip("/"):
        return f"{url} names no folder; give one, {_EXAMPLES}"
    if protocol == "file" and not rest.startswith("/"):
        return f"{url} is not absolute: file:///folder has three slashes"
    if protocol == HUB and _REPOSITORY.fullmatch(rest) is None:
        return f"{url} is not a repository, such as hf://owner/name"
    return None


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield the conflicts between settings, one line each."""
    for key, url in used_urls(config):
        if (problem := url_problem(url) or _name_problem(config, key, url)) is not None:
            yield f"{key}: {problem}"
        elif protocol_of(url) == HUB and key in _MODELS_INSTEAD:
            yield f"{key}: a hub holds models, not checkpoints; {_MODELS_INSTEAD[key]}"
    for key, url in destinations(config):
        folder = Path(url.removeprefix("file://")) / config.name
        if url.startswith("file:///") and _overlap(folder, derived.run_folder(config)):
            yield f"{key}: {url} contains the run's own folder, or lies in it; give another one"


def _name_problem(config: RunConfig, key: str, url: str) -> str | None:
    marks = (*_MARKS, "[")
    if key == "checkpoint.load" or protocol_of(url) == HUB or not any(mark in config.name for mark in marks):
        return None
    return f"the run's name, {config.name!r}, names a folder there and cannot contain {' '.join(marks)}"


def packages_for(protocol: str) -> tuple[str, ...]:
    """Return the packages of the extra `upload` that a protocol needs."""
    if protocol == HUB:
        return ("huggingface_hub",)
    return ("fsspec", "s3fs") if protocol in ("s3", "s3a") else ("fsspec",)


def protocol_problem(protocol: str) -> str | None:
    """Return why fsspec, which is installed, cannot use a protocol, such as a missing package; None if it can."""
    if protocol in (HUB, "file", "s3", "s3a"):
        return None
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        return f"cannot use {protocol}://...: {first_line(error)}"
    return None


def destinations(config: RunConfig) -> list[tuple[str, str]]:
    """Return (setting, URL) for each destination of a run's uploads."""
    uploads, exports = config.checkpoint.uploads, config.checkpoint.exports
    both = {
        "checkpoint.uploads.to": None if uploads is None else uploads.to,
        "checkpoint.exports.upload_to": None if exports is None else exports.upload_to,
    }
    return [(key, url) for key, url in both.items() if url is not None]


def used_urls(config: RunConfig) -> list[tuple[str, str]]:
    """Return (setting, URL) for each remote place that a run reads or writes: `destinations`, and where it loads."""
    load = config.checkpoint.load
    return [*destinations(config), *([("checkpoint.load", load)] if load is not None and is_url(load) else [])]


def _overlap(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
