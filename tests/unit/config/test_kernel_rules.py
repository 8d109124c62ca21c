"""What Transformer Engine's kernels ask of CUDA, cuDNN and flash-attn: each rule on both sides of its limit."""

from __future__ import annotations

import pytest
from test_validation import change, good

from plt_megatron.config.rules.fp8 import BLACKWELL, HOPPER
from plt_megatron.config.rules.kernels import Versions, find_problems

AMPERE = (8, 0)
NEW = Versions(cuda=(13, 0), cudnn=(9, 24, 0), flash_attn=(2, 8))
BARE = Versions(cuda=(12, 9), cudnn=(9, 19, 0), flash_attn=None)
FP8 = {"model__backend": "te", "training__fp8__format": "hybrid", "training__precision": "bf16"}
DETERMINISTIC = {"model__backend": "te", "training__deterministic": True}
PACKED = {**DETERMINISTIC, "data__reset_at_document_boundaries": True}
FP8_ATTENTION = {**FP8, **DETERMINISTIC, "training__fp8__attention": True, "model__kv_channels": 128}


@pytest.mark.parametrize(
    ("capability", "versions", "settings", "expected"),
    [
        (HOPPER, BARE, {**FP8, "training__fp8__recipe": "blockwise"}, None),
        (HOPPER, Versions((12, 8), None, None), {**FP8, "training__fp8__recipe": "tensorwise"}, None),
        (
            HOPPER,
            Versions((12, 8), None, None),
            {**FP8, "training__fp8__recipe": "blockwise"},
            "blockwise needs a torch built for CUDA 12.9 or newer, this one is for 12.8; use tensorwise or delayed",
        ),
        (HOPPER, BARE, FP8_ATTENTION, None),
        (
            HOPPER,
            Versions((13, 0), (9, 18, 1), (2, 8)),
            FP8_ATTENTION,
            "fp8.attention needs cuDNN 9.19 or newer, this is 9.18.1: update it, or set training.fp8.attention=false",
        ),
        (HOPPER, Versions((13, 0), (9, 18, 1), (2, 8)), {**FP8_ATTENTION, "training__deterministic": False}, None),
        (HOPPER, BARE, DETERMINISTIC, None),
        (HOPPER, BARE, {**PACKED, "data__sequence_length": 512}, None),
        (HOPPER, BARE, {**PACKED, "data__sequence_length": 4096}, "longest^2 of 1.1e+09, a microbatch may have"),
        (HOPPER, NEW, {**PACKED, "data__sequence_length": 4096}, None),
        (BLACKWELL, BARE, {**PACKED, "data__sequence_length": 4096}, None),
        (AMPERE, BARE, DETERMINISTIC, "not deterministic on sm80; install flash-attn 2.4.1 or newer, or set training"),
        (AMPERE, Versions((13, 0), (9, 24), (2, 4)), DETERMINISTIC, "not deterministic on sm80"),
        (AMPERE, NEW, PACKED, None),
        (AMPERE, BARE, {"model__backend": "te"}, None),
    ],
)
def test_what_is_left_without_a_kernel_is_refused_by_its_rule(capability, versions, settings, expected):
    found = list(find_problems(change(good(), **settings), capability, versions))
    assert len(found) == (0 if expected is None else 1), found
    assert expected is None or expected in found[0]
