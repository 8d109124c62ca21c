"""Decoding time per token: the rows of the paper's ablation compared, with the same weights.

    python benchmarks/decode.py                         # a 276M model in bf16; about eight minutes on two CPU cores
    python benchmarks/decode.py --dtype fp32 --batch 1 4
    python benchmarks/decode.py --device cuda --graph   # CUDA graphs; or --compile, torch.compile
    python benchmarks/decode.py --small                 # seconds: does it run? Times of so small a model say nothing

Protocol (paper, arXiv 2510.24824, latency table): prefill 1024, decode 256, batch 1, 4 and 16. The rows take turns,
one slice of tokens each, so that other load on the machine affects all of them. Figures are medians over slices,
and ratios are taken within a slice. Exits with 1 when a bar is missed, and says where the time goes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from plt_megatron.experiments.turns import in_turn
from plt_megatron.hf.configuration_plt import PLTConfig
from plt_megatron.hf.modeling_plt import PLTCache, PLTForCausalLM
from plt_megatron.run_folder.text import format_memory, format_table
from plt_megatron.runtime.environment import FLASH_FIRST

ROWS: dict[str, dict[str, Any]] = {
    "vanilla": {"loop_count": 1},
    "vanilla, shifted keys": {"loop_count": 1, "key_shift": "heads"},  # its turn is beside the row it is compared with
    "naive loop": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False},
    "+ CLP": {"share_kv": False, "gated_window": False},
    "+ KV sharing": {"gated_window": False},
    "PLT-2": {},
    "PLT-2, shifted keys": {"key_shift": "heads"},
    "PLT-2, last loop": {"share_kv": False, "gated_window": False, "full_attention": "last_loop"},
    "PLT-3": {"loop_count": 3},
}
MODEL = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "window_size": 64,
}
SMALL_MODEL = {**MODEL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
LENGTHS = {"1,280": 1280, "4k": 4096, "32k": 32768, "128k": 131072}

# Bars of decoding on a CPU, for models of at least this many parameters. PLT-2's are of all BOUNDED rows.
BAR_PARAMETERS = 200e6
BOUNDED = ("PLT-2", "PLT-2, last loop")
NAIVE_RANGE = (1.6, 2.4)  # times vanilla: the cost of a second loop without PLT
PLT2_TO_VANILLA = 1.25  # batch 4
PLT2_TO_NAIVE = 0.65  # batch 4
SHIFTED = 1.02  # times the same row without shifted keys
PLT2_KV = 1.07  # times vanilla, at any of LENGTHS
GPU_AIM = 1.02  # the paper's, on its GPU


@dataclass
class Timing:
    """Milliseconds per decoded token of one row, by slice, and their shares by kind (profile of a few steps)."""

    slices: list[float] = field(default_factory=list)
    prefill_seconds: float = 0.0
    kv_bytes: int = 0
    kv_tokens: int = 0
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def ms(self) -> float:
        return statistics.median(self.slices)

    def relative_to(self, other: "Timing") -> float:
        return statistics.median(a / b for a, b in zip(self.slices, other.slices, strict=True))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, default=1024, help="tokens in the cache before timing")
    parser.add_argument("--decode", type=int, default=256, help="tokens decoded by each row")
    parser.add_argument("--slice", type=int, default=16, help="tokens a row decodes before the next row's turn")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--compile", action="store_true", help="static caches and torch.compile")
    parser.add_argument("--graph", action="store_true", help="static caches and CUDA graphs")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--small", "--dry-run", action="store_true", help="a tiny model and few tokens")
    args = parser.parse_args(argv)
    if args.small:
        args.batch, args.prefill, args.decode, args.slice = args.batch[:1], 24, 8, 4
    if args.decode % args.slice or min(*args.batch, args.prefill, args.decode, args.slice) < 1:
        parser.error("every size must be positive, and --decode a multiple of --slice")
    if args.graph and not args.device.startswith("cuda"):
        parser.error("--graph needs a CUDA device")
    if args.graph and args.compile:
        parser.error("--graph and --compile exclude each other")
    return args


def build_models(args: argparse.Namespace) -> dict[str, PLTForCausalLM]:
    """Return one model per row. All share one set of weights, except for their gates."""
    torch.manual_seed(0)
    sizes = SMALL_MODEL if args.small else MODEL
    models: dict[str, PLTForCausalLM] = {}
    for name, changes in ROWS.items():
        model = PLTForCausalLM._from_config(PLTConfig(**{**sizes, **changes}), dtype=DTYPES[args.dtype])
        model = model.to(args.device).eval()
        if models:
            model.load_state_dict(models["vanilla"].state_dict(), strict=False, assign=True)
            model.tie_weights()
        models[name] = model
    return models


class Decoder:
    """Decoder of one row: its cache, and a step that is eager, compiled or a replayed CUDA graph."""

    def __init__(self, model: PLTForCausalLM, cache: PLTCache, batch: int, args: argparse.Namespace):
        self.model = model
        self.cache = cache
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=args.device)
        self.step = self._eager
        if args.compile:
            mode = "reduce-overhead" if args.device.startswith("cuda") else "default"
            self.step = torch.compile(self._eager, fullgraph=True, dynamic=False, mode=mode)
        elif args.graph:
            self.step = self._capture().replay
        if args.compile or args.graph:
            for _ in range(3):  # compile here, not in a timed slice
                self.step()

    def _eager(self) -> torch.Tensor:
        return self.model(self.tokens, cache=self.cache).logits

    def _capture(self) -> "torch.cuda.CUDAGraph":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._eager()
        return graph

    def time(self, tokens: int) -> float:
        """Decode `tokens` tokens; return milliseconds per token."""
        synchronize(self.tokens.device)
        start = time.perf_counter()
        for _ in range(tokens):
            self.step()
        synchronize(self.tokens.device)
        return (time.perf_counter() - start) / tokens * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prefill(model: PLTForCausalLM, args: argparse.Namespace, batch: int) -> tuple[PLTCache, float]:
    """Return a cache filled with `batch` copies of one prompt, and the seconds of the prefill."""
    static = args.compile or args.graph
    # Leave room for warm-up, capture and profiling in addition to the timed tokens.
    cache = model.new_cache(args.prefill + args.decode + 32 if static else None)
    prompt = torch.arange(args.prefill, device=args.device)[None] % model.config.vocab_size
    start = time.perf_counter()
    model(prompt.expand(batch if static else 1, -1), cache=cache, logits_to_keep=1)
    synchronize(prompt.device)
    seconds = time.perf_counter() - start
    if not static:
        cache.batch_repeat_interleave(batch)  # same state as a batch of equal prompts, but faster
    return cache, seconds


def measure(models: dict[str, PLTForCausalLM], batch: int, args: argparse.Namespace) -> dict[str, Timing]:
    """Time all rows at one batch size, taking turns."""
    timings = {name: Timing() for name in models}
    decoders = {}
    if args.compile:
        torch._dynamo.reset()  # it keeps few versions of a function, and each row and batch size needs one
    for name, model in models.items():
        cache, timings[name].prefill_seconds = prefill(model, args, batch)
        decoders[name] = Decoder(model, cache, batch, args)
    for turn in range(args.decode // args.slice):
        for name in in_turn(decoders, turn):
            timings[name].slices.append(decoders[name].time(args.slice))
    for name, decoder in decoders.items():
        timings[name].kv_bytes = decoder.cache.memory_bytes() // batch
        timings[name].kv_tokens = int(decoder.cache.get_seq_length())
        timings[name].parts = profile_parts(decoder)
    return timings


def profile_parts(decoder: Decoder, steps: int = 3) -> dict[str, float]:
    """Return the shares of a step's time, by the profiler's self times, in linear layers, attention and the rest."""
    cuda = decoder.tokens.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            decoder.step()
        synchronize(decoder.tokens.device)
    parts = {"linear": 0.0, "attention": 0.0, "other": 0.0}
    for event in profile.key_averages():
        name = event.key.lower()
        is_linear = any(word in name for word in ("mm", "gemm", "gemv", "linear", "cutlass", "nvjet", "splitk"))
        part = "attention" if "attention" in name or "flash" in name else "linear" if is_linear else "other"
        parts[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(parts.values()) or 1.0
    return {name: value / total for name, value in parts.items()}


def kv_bytes(config: PLTConfig, tokens: int, bytes_per_value: int) -> int:
    """Return the bytes of a sequence's decoding state (paper, Table 1).

    It is (stores * n + (L-1) * w) tokens of K and V, and L-1 carries; with shifted keys also the last token's, of half
    the key/value heads, of each loop that reads its own. Where loops have either a window or a store, only the last has
    a store.
    """
    later = config.loop_count - 1
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    windowed = config.gated_window or config.windows_earlier_loops
    stores = 1 if config.share_kv or config.windows_earlier_loops else config.loop_count
    windows = later * config.window_size if windowed else 0
    carries = later * config.hidden_size if config.cross_loop_parallel else 0
    if config.key_shift == "heads":
        own = config.loop_count if windowed else stores
        carries += own * config.num_hidden_layers * ((config.num_key_value_heads + 1) // 2) * config.head_dim
    return ((stores * tokens + windows) * values + carries) * bytes_per_value


def kv_table(models: dict[str, PLTForCausalLM], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    return {
        name: {label: kv_bytes(model.config, n, dtype.itemsize) for label, n in LENGTHS.items()}
        for name, model in models.items()
    }


def missed_time_bars(batch: int, timings: dict[str, Timing]) -> list[str]:
    """Return a line for each missed bar on times, which also says where the time goes."""
    vanilla, naive = timings["vanilla"], timings["naive loop"]
    missed = []

    def require(holds: bool, what: str, row: str = "PLT-2") -> None:
        if not holds:
            missed.append(f"batch {batch}: {what}; {where_time_goes(timings, row)}")

    ratio = naive.relative_to(vanilla)
    low, high = NAIVE_RANGE
    require(low <= ratio <= high, f"the naive loop takes {ratio:.2f}x vanilla, about 2x is expected")
    for name in ("vanilla", "PLT-2"):
        ratio = timings[f"{name}, shifted keys"].relative_to(timings[name])
        require(ratio <= SHIFTED, f"shifted keys take {ratio:.3f}x {name}, more than {SHIFTED}")
    for name in (row for row in BOUNDED if row in timings):
        ratio, to_naive = timings[name].relative_to(vanilla), timings[name].relative_to(naive)
        if batch == 1:
            require(to_naive <= 1.0, f"{name} takes {to_naive:.2f}x the naive loop, more than 1", name)
        if batch == 4:
            more = f"{name} takes {ratio:.2f}x vanilla, more than {PLT2_TO_VANILLA}"
            require(ratio <= PLT2_TO_VANILLA, more, name)
            more = f"{name} takes {to_naive:.2f}x the naive loop, more than {PLT2_TO_NAIVE}"
            require(to_naive <= PLT2_TO_NAIVE, more, name)
    return missed


def where_time_goes(timings: dict[str, Timing], row: str) -> str:
    vanilla, other = timings["vanilla"], timings[row]
    parts = (
        f"{part} {vanilla.ms * vanilla.parts.get(part, 0):.1f} -> {other.ms * other.parts.get(part, 0):.1f}"
        for part in ("linear", "attention", "other")
    )
    return f"ms per token, vanilla -> {row}: {', '.join(parts)}"


def missed_kv_bars(table: dict[str, dict[str, int]]) -> list[str]:
    missed = []
    for row, label in product(BOUNDED, LENGTHS):
        ratio = table[row][label] / table["vanilla"][label]
        if ratio > PLT2_KV:
            missed.append(f"KV cache of {row} at {label} tokens is {ratio:.3f}x vanilla, more than {PLT2_KV}")
    return missed


def print_timings(batch: int, timings: dict[str, Timing]) -> None:
    vanilla, naive = timings["vanilla"], timings["naive loop"]
    print(f"\nbatch {batch}: milliseconds per token")
    rows = [
        [
            name,
            f"{timing.ms:.2f}",
            f"{timing.relative_to(vanilla):.3f}",
            f"{timing.relative_to(naive):.3f}",
            format_memory(timing.kv_bytes),
            *(f"{timing.parts[part]:.0%}" for part in ("linear", "attention", "other")),
        ]
        for name, timing in timings.items()
    ]
    print(format_table(rows, header=["", "ms", "x vanilla", "x naive", "KV/seq", "linear", "attention", "other"]))
    print(f"(KV/seq: measured, after {vanilla.kv_tokens} tokens; shares of a step's time)")


def print_kv(table: dict[str, dict[str, int]]) -> None:
    print("\ndecoding state per sequence, by formula: MiB (times vanilla)")
    vanilla = table["vanilla"]
    rows = [
        [name, *(f"{sizes[label] / 2**20:.2f} ({sizes[label] / vanilla[label]:.4f})" for label in LENGTHS)]
        for name, sizes in table.items()
    ]
    print(format_table(rows, header=["", *LENGTHS]))


def check_formula(timings: dict[str, Timing], models: dict[str, PLTForCausalLM], dtype: torch.dtype) -> None:
    """Raise a RuntimeError if a cache's size differs from the formula's."""
    for name, timing in timings.items():
        formula = kv_bytes(models[name].config, timing.kv_tokens, dtype.itemsize)
        if timing.kv_bytes != formula:
            raise RuntimeError(f"{name}: the cache holds {timing.kv_bytes} bytes, the formula says {formula}")


def describe(args: argparse.Namespace, models: dict[str, PLTForCausalLM]) -> float:
    parameters = sum(p.numel() for p in models["vanilla"].parameters())
    how = "CUDA graph" if args.graph else "torch.compile" if args.compile else "eager"
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    print(f"{parameters / 1e6:.0f}M parameters, {args.dtype}, {how}, {device}, {torch.get_num_threads()} threads")
    print(f"prefill {args.prefill}, decode {args.decode} in slices of {args.slice}")
    if device == "CPU" and os.getloadavg()[0] > 0.5:
        print(f"this machine is busy (load {os.getloadavg()[0]:.1f}): times will be too long and uneven")
    return parameters


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    os.environ.setdefault(*FLASH_FIRST)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    models = build_models(args)
    parameters = describe(args, models)
    table = kv_table(models, dtype)
    missed, results = missed_kv_bars(table), {}
    bars_apply = args.device == "cpu" and parameters >= BAR_PARAMETERS
    with torch.inference_mode():
        for batch in args.batch:
            timings = measure(models, batch, args)
            check_formula(timings, models, dtype)
            print_timings(batch, timings)
            missed += missed_time_bars(batch, timings) if bars_apply else []
            results[batch] = {name: {**asdict(t), "ms": t.ms} for name, t in timings.items()}
    print_kv(table)
    if not args.device.startswith("cpu"):
        print(f"\nno bars on a GPU; the aim for PLT-2 is the paper's {GPU_AIM}x vanilla")
    if args.output:
        args.output.write_text(json.dumps({"arguments": vars(args), "rows": results, "kv": table}, default=str))
    print("\n" + ("\n".join(f"MISSED {line}" for line in missed) if missed else "every bar that applies is met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
