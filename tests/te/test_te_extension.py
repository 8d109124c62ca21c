"""The stand-in is compared with the C++ that it replaces: the source distribution of Transformer Engine's
extension, which `make test-te` fetches and does not build."""

from __future__ import annotations

import inspect
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.te import emulation, extension

SOURCE = emulation.FOLDER.with_name("te_source")
ENUMERATION = re.compile(r"(?:enum (?:class )?(\w+)|typedef enum) \{(.*?)\} ?(\w*);", re.DOTALL)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)


@pytest.fixture(scope="module")
def source() -> dict[str, str]:
    """Header and binding files by name, without comments."""
    archives = list(SOURCE.glob("transformer_engine_torch-*.tar.gz"))
    if not archives:
        pytest.skip("the source of Transformer Engine's extension is not here (`make test-te` fetches it)")
    with tarfile.open(archives[0]) as archive:
        return {
            member.name.partition("/")[2]: COMMENT.sub("", archive.extractfile(member).read().decode())  # type: ignore[union-attr]
            for member in archive
            if member.name.endswith((".h", ".cpp"))
        }


@pytest.fixture(scope="module")
def enumerations(source) -> dict[str, dict[str, int]]:
    """Name -> members with their values."""
    found: dict[str, dict[str, int]] = {}
    for text in source.values():
        for name, body, typedef in ENUMERATION.findall(text):
            value, members = -1, {}
            for member in filter(None, (part.strip() for part in body.split(","))):
                label, _, given = member.partition("=")
                value = int(given) if given.strip() else value + 1
                members[label.strip()] = value
            found.setdefault(name or typedef, members)
    return found


@pytest.mark.parametrize("ours", extension._ENUMERATIONS, ids=lambda kind: kind.__name__)
def test_enumerations_have_the_extensions_values(source, enumerations, ours):
    bindings = source["csrc/extensions/pybind.cpp"] + source["common_headers/common/util/pybind_helper.h"]
    # Members of two are bound under shorter names than their own.
    known = {"NVTERoutingMapFormat": "NVTE_ROUTING_MAP_FORMAT_", "NVTEQBHistogramMode": "NVTE_QB_HISTOGRAM_"}
    prefix = known.get(ours.__name__, "")
    for member in ours:
        assert enumerations[ours.__name__][prefix + member.name] == member.value, member
        assert f'"{member.name}"' in bindings, f"{member} is not bound to Python"


# ---------------------------------------------------------------- functions


def _arguments(text: str) -> list[str]:
    """Split the call or declaration whose opening parenthesis is the first character, at its own depth."""
    depth, parts = 0, [""]
    for character in text:
        depth += character in "([{<"
        depth -= character in ")]}>"
        if depth == 0:
            return [part.strip() for part in parts if part.strip()]
        if character == "," and depth == 1:
            parts.append("")
        elif not (depth == 1 and character in "([{<"):
            parts[-1] += character
    raise ValueError("no end")


def _bound(source: dict[str, str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (arguments that must be given, all)) of each function that is bound."""
    text, headers = source["csrc/extensions/pybind.cpp"], [source["csrc/extensions.h"]]
    headers += [text for name, text in source.items() if name.endswith(".h")]  # what the core library declares
    for match in re.finditer(r"m\.def(?=\()", text):
        name, target, *others = _arguments(text[match.end() :])
        declaration = re.compile(rf"\b{target.rpartition(':')[2].lstrip('&')}(?=\()")
        declared = next(filter(None, map(declaration.search, headers)), None)
        if declared is None:
            continue
        arguments = len(_arguments(declared.string[declared.end() :]))
        named = [other for other in others if other.startswith("py::arg(")]
        assert not named or len(named) == arguments, name
        yield name.strip('"'), (arguments - sum("=" in other for other in named), arguments)


def _taken(function: Callable[..., Any]) -> tuple[int, int, bool]:
    """(arguments that must be given, all, whether there may be more)."""
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    required = sum(parameter.default is parameter.empty for parameter in plain)
    return required, len(plain), len(plain) < len(parameters)


def test_functions_take_the_extensions_arguments(source):
    pytest.importorskip("torch")
    from tests.te import kernels_attention, kernels_layers, kernels_quantize

    bound = dict(_bound(source))
    assert len(bound) > 60
    functions = kernels_quantize.FUNCTIONS | kernels_layers.FUNCTIONS | kernels_attention.FUNCTIONS
    for name, function in functions.items():
        required, count, more = _taken(function)
        assert name in bound, f"{name} is not in the extension"
        assert (required == bound[name][0] and count == bound[name][1]) or (more and count <= bound[name][1]), name


def test_the_source_is_of_the_version_that_is_installed(source):
    requirements = Path(__file__).with_name("requirements.txt").read_text()
    version = re.search(r"^transformer_engine==([\d.]+)$", requirements, re.MULTILINE)[1]
    assert source and list(SOURCE.glob(f"*-{version}.tar.gz"))
