"""Which of a model's parameters a run trains: `training.trainable`.

Names are megatron-core's over the whole model, as in a checkpoint: `decoder.layers.3.mlp.linear_fc1.weight`. The
experts of a layer share one: `decoder.layers.3.mlp.experts.linear_fc1.weight`. No torch here: estimates and checks
before a start read it. A pattern stands for whole parts of a name, wherever they are in it: `plt_gate` for all gates,
`layers.2[0-9]` for ten layers, `mlp.linear_fc*.weight` for what it names in every layer.
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

EMBEDDING = "embedding.word_embeddings.weight"
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.)(\d+|\{expert\})\.")


def trains(config: RunConfig) -> Callable[[str], bool]:
    """Whether a run trains a parameter, by its name.

    Raises:
        UserError: a pattern of `training.trainable` matches no parameter of the model.
    """
    problems = find_problems(config)
    if problems:
        raise UserError("\n".join(problems))
    return partial(is_trained, config.training.trainable)


def selection(config: RunConfig) -> Callable[[str], bool] | None:
    """`trains` for counting; None: all are trained, and no name need be asked for."""
    return trains(config) if config.training.trainable else None


def trains_head(config: RunConfig) -> bool:
    """Whether it trains the output layer's weight, which may be the embedding's."""
    tied = config.model.share_embeddings_and_output_weights
    return trains(config)(EMBEDDING if tied else "output_layer.weight")


def is_trained(patterns: Sequence[str], name: str) -> bool:
    """Whether `training.trainable` has a parameter trained; without patterns it has all."""
    return not patterns or any(_matches(_EXPERT.sub("", name), pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def find_problems(config: RunConfig) -> list[str]:
    """The patterns of `training.trainable` that match no parameter of the model, one line each."""
    patterns = config.training.trainable
    names = list(_names(config.model)) if patterns else []
    return [_unmatched(each, names) for each in patterns if not any(_matches(name, each) for name in names)]


def _names(model: ModelConfig) -> Iterator[str]:
    for parameter in parameters_of(model):
        yield from (_EXPERT.sub("", parameter.in_layer(layer)) for layer in parameter.layers(model))


def _unmatched(pattern: str, names: list[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
    return f"training.trainable: {pattern!r} matches no parameter of this model; one of them is {near}"
