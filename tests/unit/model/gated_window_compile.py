"""Compiles the fused gated window for GPUs that are not here; prints registers, spills and shared memory as JSON.

python gated_window_compile.py 80,90 64,96,128      compute capabilities (A100, H100), head dimensions

Heads of 96 channels are in float16, of 256 in float32, others in bfloat16.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from plt_megatron.model import gated_window_kernel as kernels

KERNELS = (kernels._forward_kernel, kernels._backward_queries_kernel, kernels._backward_keys_kernel)
FLOAT32 = {f"{name}_ptr" for name in "logits weight bias lse dlogits dweight dbias delta share".split()}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def source_of(kernel: Any, head_dim: int, *, packed: bool, from_query: bool, dtype: str) -> tuple[Any, dict[str, int]]:
    sizes = kernels.block_sizes(head_dim, 4 if dtype == "fp32" else 2)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        "per_group": 4,
        "window": 64,
        "head_dim": head_dim,
        "block_d": triton.next_power_of_2(head_dim),
        "packed": packed,
        "from_query": from_query,
        "gate_local": True,
        "precision": "ieee" if dtype == "fp32" else "tf32",
        **sizes,
    }
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = "i32" if name == "starts_ptr" else "fp32" if name in FLOAT32 else dtype
            signature[name] = f"*{kind}"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    # As a launch would find them: pointers and strides that are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name.endswith("_ptr") or "_stride_" in name
    }
    known = {name: value for name, value in constants.items() if name in signature}
    return ASTSource(kernel, signature, known, aligned), options


def resources(ptx: str, arch: str) -> dict[str, int]:
    """What the assembler says of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [PTXAS, "-v", f"--gpu-name={arch}", path, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = {"registers": r"Used (\d+) registers", "spilled bytes": r"(\d+) bytes spill stores"}
    return {name: int(re.search(pattern, said).group(1)) for name, pattern in numbers.items()}  # type: ignore[union-attr]


def main(capabilities: list[int], head_dims: list[int]) -> None:
    rows = []
    for capability in capabilities:
        for kernel in KERNELS:
            for head_dim in head_dims:
                variant = {"packed": head_dim == 96, "from_query": head_dim != 64}
                dtype = {96: "fp16", 256: "fp32"}.get(head_dim, "bf16")
                source, options = source_of(kernel, head_dim, dtype=dtype, **variant)
                compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                assert compiled.asm["cubin"]
                arch = "sm_90a" if capability == 90 else f"sm_{capability}"
                row = {"kernel": kernel.fn.__name__, "sm": capability, "head_dim": head_dim, **variant}
                row |= {"shared": compiled.metadata.shared, **resources(compiled.asm["ptx"], arch)}
                rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*([int(each) for each in argument.split(",")] for argument in sys.argv[1:3]))
