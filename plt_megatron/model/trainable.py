"""Selection of the parameters that a run trains: `training.trainable`.

Names are megatron-core's in the whole model, as in a checkpoint: `decoder.layers.3.mlp.linear_fc1.weight`. The experts
of a layer share one name: `decoder.layers.3.mlp.experts.linear_fc1.weight`. A pattern matches whole dotted parts
anywhere in a name: `plt_gate` matches all gates, `layers.2[0-9]` ten layers, `mlp.linear_fc*.weight` those weights in
every layer. This module does not import torch, since estimates and checks before a start read it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial

from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.model.parameters import parameters_of

_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)(\d+|\{expert\})\.")


def trains(config: RunConfig) -> Callable[[str], bool]:
    """Return a predicate that tells by a parameter's name whether the run trains it. Raises `UserError` if a pattern of
    `training.trainable` matches no parameter of the model."""
    problems = find_problems(config)
    if problems:
        raise UserError("\n".join(problems))
    return partial(is_trained, config.training.trainable)


def selection(config: RunConfig) -> Callable[[str], bool] | None:
    """Return `trains` for counting, or None if all parameters are trained and no name needs a lookup. Patterns are not
    checked: a step with one loop has no gates."""
    return partial(is_trained, config.training.trainable) if config.training.trainable else None


def is_trained(patterns: Sequence[str], name: str) -> bool:
    """Return whether the patterns of `training.trainable` select a parameter; without patterns all are selected."""
    return not patterns or any(_matches(_EXPERT.sub("", name), pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def find_problems(config: RunConfig) -> list[str]:
    """List the patterns of `training.trainable` that match no parameter of the model, one line each."""
    patterns = config.training.trainable
    names = list(_names(config.model)) if patterns else []
    return [_unmatched(each, names) for each in patterns if not any(_matches(name, each) for name in names)]


def _names(model: ModelConfig) -> Iterator[str]:
    for parameter in parameters_of(model):
        yield from (_EXPERT.sub("", parameter.in_layer(layer)) for layer in parameter.layers(model))


def _unmatched(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
    return f"training.trainable: {pattern!r} matches no parameter of this model; the closest name is {near}"
