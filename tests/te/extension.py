"""A stand-in for Transformer Engine's compiled extension, `transformer_engine_torch`, for machines without a GPU.

Transformer Engine's Python is the real one. What it calls of the extension is here in plain torch (`kernels_*.py`), or
raises when called, with its name. Enumerations have the values of `transformer_engine/*.h` 2.20.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType
from typing import Any

NAME = "transformer_engine_torch"
CUDNN_VERSION = 92400  # 9.24.0
CUBLASLT_VERSION = 130101


class _Enum(IntEnum):
    """pybind11's enumerations have no arithmetic but are looked up the same way."""


def _numbered(name: str, members: str) -> Any:
    return _Enum(name, members, start=0)


DType = _Enum(
    "DType",
    {"kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6}
    | {"kFloat8E4M3": 7, "kFloat8E5M2": 8, "kFloat4E2M1": 10},
)
NVTE_Fused_Attn_Backend = _Enum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)
NVTE_Mask_Type = _numbered(
    "NVTE_Mask_Type",
    "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
    "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_QKV_Format = _numbered(
    "NVTE_QKV_Format",
    "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD NVTE_BHSD "
    "NVTE_QKV_Format_NOT_SET",
)
NVTE_QKV_Layout = _numbered(
    "NVTE_QKV_Layout",
    "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD "
    "NVTE_BS3HD NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD "
    "NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD "
    "NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD "
    "NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD "
    "NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD "
    "NVTE_BHSD_BHSD_BHSD NVTE_QKV_Layout_NOT_SET",
)
_SCALING_MODES = {
    "NVTE_DELAYED_TENSOR_SCALING": 0, "NVTE_MXFP8_1D_SCALING": 1, "NVTE_BLOCK_SCALING_1D": 2,
    "NVTE_BLOCK_SCALING_2D": 3, "NVTE_NVFP4_1D_SCALING": 4, "NVTE_INVALID_SCALING": 100,
}  # fmt: skip
_ENUMERATIONS: tuple[Any, ...] = (
    DType,
    NVTE_Fused_Attn_Backend,
    NVTE_Mask_Type,
    NVTE_QKV_Format,
    NVTE_QKV_Layout,
    _numbered("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI"),
    _numbered("NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX"),
    _Enum("NVTEScalingMode", _SCALING_MODES),
    _numbered("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID"),
    _numbered("CommOverlapType", "RS AG"),
    _numbered("CommOverlapAlgo", "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P"),
    _numbered("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8"),
    _numbered("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC"),
    _numbered("FP8FwdTensors", " ".join(f"GEMM{n}_{of}" for n in (1, 2, 3) for of in ("INPUT", "WEIGHT", "OUTPUT"))),
    _numbered("FP8BwdTensors", " ".join(f"GRAD_{of}{n}" for n in (1, 2, 3) for of in ("OUTPUT", "INPUT"))),
)


# Functions that a PLT layer's code looks up beside those that it calls.
_LOOKED_UP = ("layernorm_fwd", "layernorm_bwd")


class FP8TensorMeta:
    """Scales and amax histories of the tensors of a module."""

    scale: Any
    scale_inv: Any
    amax_history: Any


class CommOverlap:
    """Never built: communication and matrix products overlap on GPUs only."""


class CommOverlapP2P(CommOverlap):
    """Never built."""


class CommOverlapHelper:
    """Never built."""


class _Extension(ModuleType):
    """The module. What has no reference here is there, and raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{NAME}.{name} has no reference version in tests/te")

        missing.__name__ = name
        return missing


def install(functions: dict[str, Callable[..., Any]]) -> ModuleType:
    """Put the stand-in where `import transformer_engine_torch` finds it, with these `functions` in it."""
    module = _Extension(NAME)
    for enumeration in _ENUMERATIONS:
        setattr(module, enumeration.__name__, enumeration)
    for kind in (FP8TensorMeta, CommOverlap, CommOverlapP2P, CommOverlapHelper):
        setattr(module, kind.__name__, kind)
    module.get_cudnn_version = lambda: CUDNN_VERSION  # type: ignore[attr-defined]
    module.get_cublasLt_version = lambda: CUBLASLT_VERSION  # type: ignore[attr-defined]
    module.device_supports_multicast = lambda *args: False  # type: ignore[attr-defined]
    module.ubuf_built_with_mpi = lambda: False  # type: ignore[attr-defined]
    for name in _LOOKED_UP:
        setattr(module, name, getattr(module, name))  # for `from transformer_engine_torch import *`
    for name, function in functions.items():
        setattr(module, name, function)
    sys.modules[NAME] = module
    return module
