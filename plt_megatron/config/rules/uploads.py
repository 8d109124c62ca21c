"""Destinations of uploads (`checkpoint.upload_to`, `checkpoint.export_upload_to`): what they look like.

Whether one can be written is found out by `storage`, before training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.extras import lacking

HUB = "hf"
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.+)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_EXAMPLES = "as s3://bucket/folder, file:///folder or hf://owner/name"


def is_url(text: str) -> bool:
    """Whether it names something outside this machine's folders."""
    return "://" in text


def protocol_of(url: str) -> str:
    """`s3` of `s3://bucket/folder`."""
    return url.partition("://")[0]


def join(url: str, *names: str) -> str:
    """A folder or file below a URL."""
    return "/".join([url.rstrip("/"), *names])


def exports_of(config: RunConfig) -> str | None:
    """The destination of a run's exports, a folder of its own or a repository; None: they are not uploaded."""
    to = config.checkpoint.export_upload_to
    return to if to is None or protocol_of(to) == HUB else join(to, config.name)


def checkpoints_of(config: RunConfig) -> str | None:
    """The folder that has the run's name at the destination of checkpoints; None: they are not uploaded."""
    to = config.checkpoint.upload_to
    return to if to is None else join(to, config.name)


def url_problem(url: str) -> str | None:
    """What is wrong with a URL by its looks alone; None: nothing. No secret in it is repeated."""
    match = _URL.fullmatch(url)
    if match is None:
        return f"{url} is not a URL, {_EXAMPLES}"
    protocol, rest = match.groups()
    if protocol != HUB and ":" in rest.split("/")[0].rpartition("@")[0]:
        return "it has a password in it, which belongs in the environment or its library's own configuration"
    if any(mark in url for mark in ("::", "?", "#", "*")):
        return f"{protocol}://... has one of :: ? # *; give a plain URL, {_EXAMPLES}"
    if protocol == "file" and not rest.startswith("/"):
        return f"{url} is not absolute: file:///folder has three slashes"
    if protocol == HUB and _REPOSITORY.fullmatch(rest) is None:
        return f"{url} is not a repository, as hf://owner/name"
    return None


def find_problems(config: RunConfig) -> Iterator[str]:
    """What does not fit together, one line each."""
    checkpoint = config.checkpoint
    for key, url in destinations(config):
        problem = url_problem(url)
        if problem is not None:
            yield f"{key}: {problem}"
        elif protocol_of(url) == "file" and _overlap(Path(url[7:]) / config.name, derived.run_folder(config)):
            yield f"{key}: {url} has the run's own folder in it, or lies in it; give another one"
    if checkpoint.upload_to is not None and protocol_of(checkpoint.upload_to) == HUB:
        yield "checkpoint.upload_to: a hub is for models, checkpoint.export_upload_to; give a bucket or folder"
    if checkpoint.upload_to is not None and not checkpoint.enabled:
        yield "checkpoint.upload_to uploads checkpoints, and checkpoint.enabled=false writes none"
    if checkpoint.export_upload_to is not None and checkpoint.export_interval == 0:
        yield "checkpoint.export_upload_to uploads a run's exports: set checkpoint.export_interval"
    if checkpoint.load is not None and is_url(checkpoint.load):
        problem = url_problem(checkpoint.load)
        if problem is not None:
            yield f"checkpoint.load: {problem}"
        elif protocol_of(checkpoint.load) == HUB:
            yield "checkpoint.load: a hub has models, no checkpoints; plt import makes one of a downloaded model"


def find_package_problems(config: RunConfig) -> Iterator[str]:
    """Packages that are missing, one line each."""
    load = config.checkpoint.load
    used = [*destinations(config), *([("checkpoint.load", load)] if load is not None and is_url(load) else [])]
    for key, url in used:
        problem = lacking(*packages_for(protocol_of(url)))
        if problem:
            yield f"{key} {problem}"


def packages_for(protocol: str) -> tuple[str, ...]:
    """What the extra `upload` installs of what the protocol needs."""
    if protocol == HUB:
        return ("huggingface_hub",)
    return ("fsspec", "s3fs") if protocol in ("s3", "s3a") else ("fsspec",)


def destinations(config: RunConfig) -> list[tuple[str, str]]:
    """(setting, URL) of what a run uploads to."""
    settings = config.checkpoint
    both = {"checkpoint.upload_to": settings.upload_to, "checkpoint.export_upload_to": settings.export_upload_to}
    return [(key, url) for key, url in both.items() if url is not None]


def _overlap(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)
