"""Agreement of all ranks while they save, load, or wait for one another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from plt_megatron.errors import AttemptFailed, UserError, describe_os_error, first_line

logger = logging.getLogger(__name__)


def on_rank_0[T](function: Callable[[], T]) -> T:
    """Run `function` on rank 0 and give every rank its result. Collective.

    Raises:
        UserError: on all ranks, if it raised one on rank 0; an AttemptFailed for an OSError too. Any other error is
            raised unchanged on rank 0, and the other ranks raise a RuntimeError instead of waiting.
    """
    outcome: list[Any] = [None, None, UserError]
    unexpected: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except (OSError, UserError) as error:
            outcome[1:] = describe(error), AttemptFailed if isinstance(error, OSError | AttemptFailed) else UserError
        except Exception as error:
            outcome[1:] = f"rank 0 failed: {describe(error)}", RuntimeError
            unexpected = error
    dist.broadcast_object_list(outcome, src=0)
    result, message, kind = outcome
    if unexpected is not None:
        raise unexpected
    if message is not None:
        raise kind(message)
    return result


def first_of_all_ranks(message: str | None) -> str | None:
    """Return the lowest rank's message, if any rank has one. Collective."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return next((text for text in messages if text), None)


def any_rank(state: bool) -> bool:
    """Return whether `state` is true on any rank. Collective."""
    found = torch.tensor(float(state), device=torch.cuda.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def describe(error: BaseException) -> str:
    """Describe an error in one line: the system's message about a file, or the error's own."""
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error)
    return str(error).strip().splitlines()[-1] if "Traceback" in str(error) else first_line(error)


def say(message: str, level: int = logging.INFO) -> None:
    if dist.get_rank() == 0:
        logger.log(level, "%s", message)
