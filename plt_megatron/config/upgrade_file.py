"""Rewrite a configuration file with the current names of its settings, keeping comments and layout if possible."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from plt_megatron.config import yaml_nodes
from plt_megatron.config.upgrade import GONE, SWITCHES, Settings, flat, new_name, upgrade
from plt_megatron.errors import UserError

_COMMENT = re.compile(r"(?:^|\s)(#.*?)\s*$", re.MULTILINE)
# Former defaults other than null of settings that are in sections now.
_DEFAULTS: dict[str, Any] = yaml.safe_load(
    """{first_k_dense_replace: 0, moe_router_topk: 2, moe_router_pre_softmax: false, moe_router_score_function: softmax,
    moe_router_load_balancing_type: seq_aux_loss, moe_aux_loss_coeff: 0.01, moe_z_loss_coeff: 0,
    moe_router_enable_expert_bias: false, moe_router_bias_update_rate: 0.001, rope_scaling_type: llama3,
    yarn_beta_fast: 32, yarn_beta_slow: 1, yarn_correction_range_round_to_int: true, fp8_recipe: auto,
    fp8_attention: false, first_last_layers_bf16: false, num_layers_at_start_in_bf16: 1, num_layers_at_end_in_bf16: 1,
    spike_threshold: 6, spike_window: 128, upload_keep_last: 2, fim_spm_rate: 0.5, profile_step_start: 0,
    profile_ranks: [0], straggler_threshold: 0.75, stage: 1, offload_optimizer: none, offload_param: none}"""
)
_ENDS = [f"training.num_layers_at_{end}_in_bf16" for end in ("start", "end")]
_RATE = "model.moe_router_bias_update_rate"
# Value (True: any but null, false and 0), old setting, and others that must stand beside it to tell the new value.
_NEEDS: tuple[tuple[Any, ...], ...] = (
    (False, "model.ffn_output_norm", "model.norm_placement"),
    (False, "model.moe_router_pre_softmax", "model.moe_router_score_function"),
    (False, "model.moe.router_pre_softmax", "model.moe.router_score_function"),
    ("softmax", "model.moe_router_score_function", "model.moe_router_pre_softmax"),
    (False, "model.hidden_norm", "model.norm_between_loops"),
    (False, "model.norm_between_loops", "model.hidden_norm"),
    (True, "model.hidden_scale_ratio", "model.embedding_scale", "model.init_method_std"),
    (None, "model.hidden_scale_ratio", "model.hidden_scale"),
    (True, "model.rope_scaling_type", "model.yarn_original_max_position_embeddings"),
    (True, "model.moe_router_enable_expert_bias", _RATE),
    (True, _RATE, "model.moe_router_enable_expert_bias"),
    (True, "training.first_last_layers_bf16", *_ENDS),
    *((True, end, "training.first_last_layers_bf16") for end in _ENDS),
)
_OF_PRESETS = {f"model.{name}" for name in ("hidden_norm", "norm_between_loops", "embedding_scale", "hidden_scale")}


def upgrade_text(text: str, name: str) -> str:
    """Return the text with new names of a run's configuration, or of a part of one for others to include.

    Sections without moved settings stay as they are; comments stay with the settings below or beside them.

    Raises:
        UserError: the text is not a YAML document of sections, gives a setting under its old and its new name, means
            what it does with other files only, or has a comment or layout that would be lost.
    """
    before = yaml_nodes.compose(text, name)
    if before is None:
        return text
    if not isinstance(before, yaml.MappingNode):
        raise UserError(f"{name}: expected `key: value` lines")
    after = upgrade(before)
    old, new = flat(before) or {}, flat(after) or {}  # None: of a sweep or another file
    left = ((key, "beside the others") for key in filter(new_name, new))
    for key, why in (*_unclear(old, new), *left):
        now = f", now {new_name(key)}," if new_name(key) else ""
        raise UserError(f"{yaml_nodes.where(old[key])}: {key}{now} cannot be rewritten {why}: do it by hand")
    if after is before:
        return text
    lines = text.splitlines()
    start = before.start_mark.line
    found = [*lines[: _with_comments(lines, start, 0)], *_Writer(text).block(after, before, "")]
    upgraded = "\n".join(found) + "\n"
    for lost in Counter(_COMMENT.findall(text)) - Counter(_COMMENT.findall(upgraded)):
        at = next(found.start(1) for found in _COMMENT.finditer(text) if found[1] == lost)
        line = text.count("\n", 0, at) + 1
        raise UserError(f"{name}:{line}: the comment {lost!r} would be lost: move or remove it, or edit it by hand")
    is_empty = not yaml_nodes.plain(after) and old.keys() <= GONE.keys()
    if not (is_empty or _says(upgraded, after, name)):
        raise UserError(f"{name}: its layout is too unusual to rewrite: edit it by hand")
    return upgraded


def _unclear(old: Settings, new: Settings) -> Iterator[tuple[str, str]]:
    """Yield settings of a file whose meaning may lie in others, which it includes or which include it, and why they
    cannot be rewritten."""
    preset = old.get("model.loop_preset")
    given = old.keys() | (set() if preset is None or yaml_nodes.is_null(preset) else _OF_PRESETS)
    for value, key, *others in _NEEDS:
        alone = "include" not in old and (key != _RATE or "model.num_moe_experts" in old)
        if key in old and not (alone or given.issuperset(others)):
            found = yaml_nodes.plain(old[key])
            if (bool(found) if value is True else found) == value:
                yield key, f"without {' and '.join(others)}, which other files may give"
    for section, switch in SWITCHES.items():
        inside = [key for key in old if key != switch and (new_name(key) or key).startswith(f"{section}.")]
        other = [key for key in inside if yaml_nodes.plain(old[key]) != _DEFAULTS.get(key.rpartition(".")[2])]
        if section in new:  # off
            yield from ((key, f"with {switch} off: files that include this one may need it") for key in other)
        elif switch not in old and all(map(new_name, inside)) and any(key.startswith(f"{section}.") for key in new):
            if section in ("training.fp8", "deepspeed") or not (other or "include" in old):
                yield from ((key, f"without {switch}, the switch of its section") for key in inside)


def _says(text: str, expected: yaml.MappingNode, name: str) -> bool:
    try:
        written = yaml_nodes.compose(text, name)
    except UserError:  # no valid YAML
        return False
    return written is not None and yaml_nodes.plain(written) == yaml_nodes.plain(expected)


def _with_comments(lines: list[str], line: int, end: int) -> int:
    """Return the first line of the comments right above a line, but not above line `end`."""
    while line > end and lines[line - 1].lstrip().startswith("#"):
        line -= 1
    return line


class _Writer:
    """Writes sections of a document, reusing lines and texts of another."""

    def __init__(self, text: str) -> None:
        self._text, self._lines = text, text.splitlines()

    def block(self, section: yaml.MappingNode, old: yaml.Node | None, indent: str) -> Iterator[str]:
        """Yield the lines of a section in block style."""
        former = {key.value: (key, value) for key, value in old.value} if isinstance(old, yaml.MappingNode) else {}
        if former and isinstance(old, yaml.MappingNode) and not old.flow_style:
            indent = old.value[0][0].start_mark.column * " "
        for key, value in section.value:
            before = former.get(key.value)
            if before is not None and _same(before[1], value):
                yield from self._untouched(old, before[0])
                continue
            if isinstance(value, yaml.MappingNode) and value.value:
                name, inner = before if before and isinstance(before[1], yaml.MappingNode) else (None, None)
                if name and inner and inner.flow_style:
                    yield f"{indent}{key.value}: {yaml_nodes.to_text(value)}{self._beside(inner)}"
                    continue
                yield from self._comments(name, indent)
                yield f"{indent}{key.value}:{self._beside(name) if name else ''}"
                yield from self.block(value, inner, indent + "  ")
            else:
                yield from self._comments(value, indent)
                yield f"{indent}{key.value}: {yaml_nodes.to_text(value)}{self._beside(value)}"
        if isinstance(old, yaml.MappingNode) and not old.flow_style:
            yield from self._below(old, section)

    def _below(self, old: yaml.MappingNode, section: yaml.MappingNode) -> list[str]:
        """Return what follows a section's last setting, unless that has been written with it."""
        (key, last), end = old.value[-1], self._end(old)
        entry = next((value for name, value in section.value if name.value == key.value), None)
        is_block = isinstance(last, yaml.MappingNode) and not last.flow_style
        if entry is not None and (_same(last, entry) or (is_block and isinstance(entry, yaml.MappingNode))):
            return []
        first = end
        while self._lines[first - 1].lstrip()[:1] in ("", "#"):
            first -= 1
        return self._lines[first:end]

    def _untouched(self, section: yaml.Node | None, key: yaml.ScalarNode) -> list[str]:
        """Return the lines of a setting with the comments above it, up to those of the next one."""
        assert isinstance(section, yaml.MappingNode)
        starts = [each.start_mark.line for each, _ in section.value]
        number = starts.index(key.start_mark.line)
        end = self._end(section) if number + 1 == len(starts) else starts[number + 1]
        first = _with_comments(self._lines, starts[number], starts[number - 1] + 1 if number else 0)
        last = end if number + 1 == len(starts) else _with_comments(self._lines, end, starts[number] + 1)
        return self._lines[first:last]

    def _end(self, section: yaml.MappingNode) -> int:
        """Return the line after a section's last one and the comments below it that are not the next setting's."""
        mark = section.end_mark
        is_last = mark.index >= len(self._text)
        return len(self._lines) if is_last else _with_comments(self._lines, mark.line, section.start_mark.line)

    def _comments(self, node: yaml.Node | None, indent: str) -> list[str]:
        if node is None or not self._is_first(node):
            return []
        line = node.start_mark.line
        return [indent + text.strip() for text in self._lines[_with_comments(self._lines, line, 0) : line]]

    def _is_first(self, node: yaml.Node) -> bool:
        """Return whether no other setting precedes the node in its line."""
        before = self._lines[node.start_mark.line][: node.start_mark.column]
        return "{" not in before and before.count(":") <= 1

    def _beside(self, node: yaml.Node) -> str:
        rest = "".join(self._lines[node.end_mark.line :][:1])[node.end_mark.column :].lstrip(": \t")
        return f"  {rest}" if rest.startswith("#") else ""


def _same(one: yaml.Node, other: yaml.Node) -> bool:
    """Return whether two nodes hold the same value nodes."""
    if not isinstance(one, yaml.MappingNode) or not isinstance(other, yaml.MappingNode):
        return one is other
    return [*(flat(one) or {}).items()] == [*(flat(other) or {}).items()]  # a node equals only itself
