"""The fused gated window against dense attention in float64, as a program: prints the errors of each case as JSON.

Without arguments, every case; with `quick`, those that between them have every way through the kernels.
In a process of its own, since Triton's interpreter has to be chosen before Triton is imported. On a machine with a GPU
the same cases run compiled, without it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from plt_megatron.config.schema import ParallelConfig  # noqa: E402
from plt_megatron.model.gated_window_kernel import gated_window  # noqa: E402
from plt_megatron.model.loop_context import LoopStatistics  # noqa: E402
from plt_megatron.model.looped_gpt import MicroBatch  # noqa: E402
from tests.unit.model.tiny_models import LOOPCODER_V2, build, differences  # noqa: E402
from tests.unit.model.tiny_models import draw as draw_batch  # noqa: E402


def mend_interpreter() -> None:
    """Triton 3.8's interpreter keeps bfloat16 as bit patterns and multiplies those in `dot`: multiply the numbers."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def as_numbers(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, as_numbers(a), as_numbers(b), *rest)


def reference(query, key, value, y_global, *, window_size, logits, gate_side, starts) -> Tensor:
    """The equations, with a dense mask; [s, b, heads, d]."""
    s, heads, groups = query.shape[0], query.shape[2], key.shape[2]
    key, value = (tensor.repeat_interleave(heads // groups, dim=2) for tensor in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * query.shape[-1] ** -0.5
    i, j = torch.arange(s, device=DEVICE)[:, None], torch.arange(s, device=DEVICE)[None, :]
    seen = ((j <= i) & (j > i - window_size))[None] & (True if starts is None else j >= starts[:, :, None])
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)
    y_local = torch.einsum("bhij,jbhd->ibhd", weights, value)
    g = torch.sigmoid(logits).unsqueeze(-1)
    return g * y_local + (1 - g) * y_global if gate_side == "local" else g * y_global + (1 - g) * y_local


def document_starts(s: int, *rows: list[int]) -> Tensor:
    """int32 [b, s]: for each token, where its document starts; `rows` are the documents' first tokens."""
    at = torch.zeros(len(rows), s, dtype=torch.int32, device=DEVICE)
    for row, firsts in enumerate(rows):
        for first in firsts:
            at[row, first:] = first
    return at


def draw(s: int, heads: int, groups: int, d: int, dtype: torch.dtype, b: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return {
        "query": normal(s, b, heads, d),
        "key": normal(s, b, groups, d),
        "value": normal(s, b, groups, d),
        "y_global": normal(s, b, heads, d),
        "dout": normal(s, b, heads, d),
        "logits": normal(s, b, heads),
        "weight": 0.3 * normal(heads, d),
        "bias": normal(heads),
    }


def compare(data: dict[str, Tensor], *, gate: str, **settings: Any) -> dict[str, float]:
    """The largest error of output and of each gradient, as a share of the reference's largest value."""
    names = ["query", "key", "value", "y_global", *(["logits"] if gate == "hidden" else ["weight", "bias"])]
    starts = settings.pop("starts")
    own = {name: data[name].clone().requires_grad_() for name in names}
    tensors = [own.pop(name) for name in ("query", "key", "value", "y_global")]
    out = gated_window(*tensors, document_starts=starts, **own, **settings)
    out.backward(data["dout"])

    exact = {name: data[name].double().requires_grad_() for name in names}
    logits = exact.get("logits")
    if logits is None:
        logits = (exact["query"] * exact["weight"]).sum(dim=-1) + exact["bias"]
    inputs = [exact[name] for name in ("query", "key", "value", "y_global")]
    expected = reference(*inputs, logits=logits, starts=starts, **settings)
    expected.backward(data["dout"].double())
    pairs = {"out": (out.detach(), expected.detach())}
    for name, tensor in zip(names, [*tensors, *own.values()], strict=True):
        pairs[name] = (tensor.grad, exact[name].grad)
    # A softmax over one key has no gradient: not a share of nothing, then.
    return {name: ((a.double() - b).abs().max() / max(b.abs().max(), 1e-3)).item() for name, (a, b) in pairs.items()}


CASES = {
    "one key": {"window_size": 1},
    "window 7, odd length": {"window_size": 7, "s": 77},
    "window of a block": {"window_size": 64, "s": 130},
    "window over blocks": {"window_size": 65, "s": 200},
    "window beyond the row": {"window_size": 512, "s": 100},
    "one head a group": {"window_size": 16, "groups": 4},
    "one group": {"window_size": 16, "groups": 1},
    "gate on the global side": {"window_size": 16, "gate_side": "global"},
    "gate of hidden states": {"window_size": 16, "gate": "hidden"},
    "hidden, global": {"window_size": 16, "gate": "hidden", "gate_side": "global"},
    "packed": {"window_size": 16, "starts": [[0, 3, 4, 40], [0, 70]]},
    "packed, window beyond": {"window_size": 128, "gate": "hidden", "starts": [[0, 64], [0, 1, 2, 50]]},
    "96 channels": {"window_size": 16, "d": 96},
    "128 channels": {"window_size": 33, "d": 128},
    "single token": {"window_size": 4, "s": 1},
}


HALF = {"window_size": 64, "s": 150, "heads": 2, "groups": 1, "starts": [[0, 9, 100]]}
CASES |= {
    "bf16, 64 channels": {**HALF, "d": 64, "dtype": torch.bfloat16},
    "fp16, 96 channels": {**HALF, "d": 96, "dtype": torch.float16},
    "bf16, 128 channels": {**HALF, "d": 128, "dtype": torch.bfloat16},
    "bf16, window 512": {**HALF, "d": 64, "dtype": torch.bfloat16, "window_size": 512, "s": 560, "starts": None},
}


QUICK_CASES = ("one group", "hidden, global", "bf16, 64 channels")
QUICK_MODELS = ("LoopCoder-v2, packed",)


def errors_of(case: dict[str, Any]) -> dict[str, float]:
    case = {"s": 80, "heads": 4, "groups": 2, "d": 16, "dtype": torch.float32, "starts": None} | case
    settings = {"window_size": case["window_size"], "gate_side": "local", "gate": "query"}
    settings |= {name: case[name] for name in ("gate_side", "gate") if name in case}
    s, starts = case["s"], case["starts"]
    starts = None if starts is None else document_starts(s, *starts)
    data = draw(s, case["heads"], case["groups"], case["d"], case["dtype"], 1 if starts is None else len(starts))
    return compare(data, starts=starts, **settings)


def strided() -> dict[str, float]:
    """Q with the hidden gate's logit as one more channel, K and V as slices of one tensor: read where they are."""
    data = draw(40, 4, 2, 16, torch.float32, 1)
    whole = [data[name] for name in ("query", "key", "value", "y_global")]
    plain = gated_window(*whole, window_size=8, logits=data["logits"])
    query = torch.cat((data["query"], data["logits"].unsqueeze(-1)), dim=-1)
    kv = torch.cat((data["key"], data["value"]), dim=-1)
    parts = query[..., :16], kv[..., :16], kv[..., 16:], data["y_global"]
    return {"out": (gated_window(*parts, window_size=8, logits=query[..., 16]) - plain).abs().max().item()}


def mistakes() -> dict[str, float]:
    """How far the output is from a reference that differs in one thing."""
    data, starts = draw(80, 4, 2, 16, torch.float32, 2), document_starts(80, [0, 5, 33], [0, 50])
    right = {"window_size": 16, "gate_side": "local", "starts": starts}
    inputs = [data[name] for name in ("query", "key", "value", "y_global")]
    own = gated_window(*inputs, logits=data["logits"], window_size=16, document_starts=starts)
    errors = {}
    for name, wrong in {
        "window one short": {"window_size": 15},
        "window one long": {"window_size": 17},
        "other side": {"gate_side": "global"},
        "documents ignored": {"starts": None},
    }.items():
        exact = [tensor.double() for tensor in inputs]
        expected = reference(*exact, logits=data["logits"].double(), **(right | wrong))
        errors[name] = (own - expected).abs().max().item()
    return errors


def same_twice() -> bool:
    """Whether two backward passes give the same bits."""
    data = draw(80, 2, 1, 16, torch.float32, 1)
    grads = []
    for _ in range(2):
        leaves = [
            data[name].clone().requires_grad_() for name in ("query", "key", "value", "y_global", "weight", "bias")
        ]
        out = gated_window(*leaves[:4], weight=leaves[4], bias=leaves[5], window_size=16)
        grads.append(torch.autograd.grad(out, leaves, data["dout"]))
    return all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


MODELS: dict[str, dict[str, Any]] = {
    "PLT-2": {},
    "PLT-3, packed": {"loop_count": 3},
    "LoopCoder-v2, packed": LOOPCODER_V2,
    "window of one": {"window_size": 1},
}


def model_differences(settings: dict[str, Any], packed: bool, recompute: str) -> dict[str, float]:
    """Losses, every gradient and the logged gates of a whole model, fused against not."""
    data, results = draw_batch(), []
    for fused in (False, True):
        stage = build({"kv_channels": 16, **settings, "fused_gated_window": fused}, recompute=recompute)
        starts = data["starts"].to(DEVICE) if packed else None
        statistics = LoopStatistics(stage.plt.loop_count, stage.plt.num_layers, torch.cuda.current_device())
        tokens, labels = data["tokens"].to(DEVICE), data["labels"].to(DEVICE)
        losses = stage(MicroBatch(tokens, labels=labels, document_starts=starts, statistics=statistics))
        losses.sum().backward()
        found = {name: parameter.grad for name, parameter in stage.named_parameters() if parameter.grad is not None}
        gates = torch.tensor(statistics.reduce()["gate_mean"][1:])
        results.append({"losses": losses.detach(), **found, "gates": gates})
    return differences(results[1], results[0])


def models(chosen: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime
    from plt_megatron.runtime.process_groups import init_process_groups

    enter_cpu_runtime()
    init_process_groups(ParallelConfig())
    return {
        f"{name}, recompute {recompute}": model_differences(settings, name.endswith("packed"), recompute)
        for name, settings in chosen.items()
        for recompute in ("none", "selective", "full")
        if recompute == "none" or name == "PLT-3, packed"
    }


if __name__ == "__main__":
    if DEVICE == "cpu":
        mend_interpreter()
    if sys.argv[1:] == ["quick"]:
        CASES = {name: CASES[name] for name in QUICK_CASES}
        MODELS = {name: MODELS[name] for name in QUICK_MODELS}
    results = {"cases": {name: errors_of(case) for name, case in CASES.items()}, "models": models(MODELS)}
    results |= {"strided": strided(), "mistakes": mistakes(), "same twice": same_twice()}
    print(json.dumps(results))
