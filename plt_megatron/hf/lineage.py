"""Name and license of a Hugging Face folder's model, which models made from it must state too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$")  # in the hub's cache


def read_lineage(folder: Path) -> dict[str, str]:
    """Return `base_model`, by its name on the hub if the folder reveals it, and its card's license keys."""
    found = _SNAPSHOT.search(str(folder.absolute()))
    name = f"{found[1]}/{found[2]}" if found else folder.resolve().name
    return {"base_model": name, **read_license(folder)}


def read_license(folder: Path) -> dict[str, str]:
    """Return the license keys in the front matter of the folder's card, if it has one: it is between lines of `---`."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values: Any = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key in _LICENSE if isinstance(values.get(key), str)}


def front_matter(lineage: dict[str, str]) -> list[str]:
    """Return the lines of a card's front matter."""
    known = {key: lineage[key] for key in (*_LICENSE, "base_model") if key in lineage}
    return yaml.safe_dump(known, sort_keys=False).splitlines() if known else []
