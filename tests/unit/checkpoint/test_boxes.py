"""A flat range of a tensor as boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plt_megatron.train.checkpoint.megatron_state import boxes


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 6), (4, 1), (3, 2, 4)])
def test_boxes_are_the_range_in_its_order(shape):
    elements = np.arange(math.prod(shape)).reshape(shape)
    for start in range(elements.size + 1):
        for stop in range(start, elements.size + 1):
            found = list(boxes(shape, start, stop))
            parts = [elements[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1) for box in found]
            assert [*map(int, np.concatenate([*parts, []]))] == list(range(start, stop))
            assert len(found) <= 2 * len(shape) - 1
