"""How far another node's clock is off."""

from __future__ import annotations

import pytest

from plt_megatron.launcher.hub import clock_skew


@pytest.mark.parametrize(
    ("theirs", "skew"),
    [(100.0, 0.0), (101.0, 0.0), (102.0, 0.0), (109.0, 7.0), (93.0, -7.0)],
    ids=["there at once", "halfway", "back at once", "ahead", "behind"],
)
def test_what_the_way_may_account_for_is_no_skew(theirs, skew):
    assert clock_skew(100.0, theirs, 102.0) == skew
