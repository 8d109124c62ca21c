#!/usr/bin/env python3
"""Decoding time in vLLM: one loop, naive loops, and PLT of two and three loops compared.

    python benchmarks/serving.py              # a 276M model in bf16, batch 1, 4 and 16, then a mixed load
    python benchmarks/serving.py --compile    # torch.compile (and CUDA graphs on a GPU)
    python benchmarks/serving.py --lora --rows vanilla "PLT-2, serial" PLT-2    # every request with a LoRA adapter
    python benchmarks/serving.py --small      # does it run? Times of so small a model say nothing

All engines run in this process and take turns, a few decode steps each, so that other load on the machine affects all
of them; each turn starts with another. Figures are medians over turns, and ratios are taken within a turn. Exits with
1 when a bar is missed.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))  # for LoRA adapters
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plt_megatron.experiments.turns import in_turn

ROWS = {
    "vanilla": {"loop_count": 1},
    "naive loops": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False},
    "+ CLP": {"share_kv": False, "gated_window": False},
    "+ KV sharing": {"gated_window": False},
    "PLT-2": {},
    "PLT-2, serial": {},
    "PLT-2, last loop": {"share_kv": False, "gated_window": False, "full_attention": "last_loop"},
    "PLT-3": {"loop_count": 3},
    "vanilla, shifted heads": {"loop_count": 1, "key_shift": "heads"},
    "PLT-2, shifted heads": {"key_shift": "heads"},
    "PLT-2, shifted channels": {"key_shift": "channels"},
    "PLT-2, learned shift": {"key_shift": "learned"},
}
# Rows whose server has options of the plugin, for vLLM's `--additional-config`.
PLUGIN = {"PLT-2, serial": {"plt": {"loop_mode": "serial"}}}
WITH_BARS = ["vanilla", "naive loops", "PLT-2", "PLT-3"]
MODEL = {
    "architectures": ["PLTForCausalLM"],
    "model_type": "plt",
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
    "loop_count": 2,
    "dtype": "bfloat16",
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
BOUNDED = ["PLT-2", "PLT-2, last loop"]
PLT2_TO_VANILLA = {"cpu": 1.25, "cuda": 1.05}  # at batch 1 and 4
PLT2_TO_NAIVE = 0.65
RANK = 8  # of LoRA adapters


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=6, help="decode steps in a turn")
    parser.add_argument("--requests", type=int, default=24, help="of the mixed load; 0: none")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=WITH_BARS, help="of the ablation")
    parser.add_argument(
        "--lora", action="store_true", help="requests with a LoRA adapter of rank 8 in all linear layers"
    )
    add_options(parser, turns=12)
    args = parser.parse_args()
    if args.small:
        args.batch, args.prompt, args.turns, args.steps, args.requests = [1, 4], 16, 2, 2, 4
    return args


def add_options(parser: argparse.ArgumentParser, turns: int) -> None:
    """Add the options that the benchmarks with engines in one process share; `turns` is the default of --turns."""
    parser.add_argument("--turns", type=int, default=turns, help="turns that each engine gets")
    parser.add_argument("--num-layers", type=int, help="of the model (default: 16)")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--small", action="store_true")


def keep_engines_here() -> None:
    """Set vLLM to run its engines in this process, quietly, on all cores. Call this before importing vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def make_engine(row: str, folder: Path, args: argparse.Namespace, **options):
    """Return a row's engine with random weights; only the time of its layers matters. `options` are vLLM's."""
    from vllm import LLM

    folder.mkdir()
    config = {**MODEL, **(SMALL if args.small else {}), **ROWS[row]}
    if args.num_layers:
        config["num_hidden_layers"] = args.num_layers
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=not args.compile,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=1 << 29,
        gpu_memory_utilization=0.1,  # of what must be free: other engines are loaded too
        enable_prefix_caching=False,
        seed=0,
        additional_config=PLUGIN.get(row, {}),
        **options,
    ).llm_engine


def make_lora_engine(row: str, folder: Path, args: argparse.Namespace):
    """Return an engine as `make_engine` does, and write a random LoRA adapter to `folder`/adapter."""
    engine = make_engine(row, folder, args, enable_lora=True, max_loras=2, max_lora_rank=RANK)
    write_random_adapter(folder)
    return engine


def write_random_adapter(folder: Path) -> None:
    """Write an adapter for the linear layers of the model in `folder`, except its head."""
    import torch
    from adapters import write_adapter

    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    with torch.device("meta"):
        model = PLTForCausalLM(PLTConfig.from_pretrained(folder))
    pairs = {
        name: (torch.randn(RANK, layer.in_features) / layer.in_features**0.5, torch.randn(layer.out_features, RANK))
        for name, layer in model.named_modules()
        if ".layers." in name and isinstance(layer, torch.nn.Linear)
    }
    write_adapter(folder / "adapter", pairs, alpha=1)


def add_request(engine, name: str, prompt: list[int], tokens: int) -> None:
    """Add a request for `tokens` tokens after a prompt, with the model's adapter if the engine takes some."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    folder, adapter = Path(engine.vllm_config.model_config.model), None
    if engine.vllm_config.lora_config:
        adapter = LoRARequest("adapter", 1, str(folder / "adapter"))
    engine.add_request(name, {"prompt_token_ids": prompt}, params, lora_request=adapter)


def make_prompt(seed: int, count: int) -> list[int]:
    return [random.Random(seed).randrange(1, 500) for _ in range(count)]


class Decoding:
    """An engine with a batch of requests whose prompts have been computed."""

    def __init__(self, engine, batch: int, prompt: int, tokens: int):
        self.engine = engine
        for index in range(batch):
            add_request(engine, str(index), make_prompt(index, prompt), tokens)
        self.names = [str(index) for index in range(batch)]
        self.first_tokens(batch)

    def first_tokens(self, batch: int) -> None:
        started: set[str] = set()
        while len(started) < batch:
            started |= {out.request_id for out in self.engine.step() if out.outputs[0].token_ids}

    def milliseconds(self, steps: int) -> float:
        """Return milliseconds per decode step, as the mean of `steps` steps.

        On a GPU vLLM returns from a step while the next one runs: the clock starts when those of other engines are done
        and this engine's, which had ended before its turn, has been taken.
        """
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.engine.step()
        begun = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        return 1e3 * (time.perf_counter() - begun) / steps

    def stop(self) -> None:
        self.engine.abort_request(self.names)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def decode_times(engines: dict, batch: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return milliseconds per decode step, by row and turn."""
    tokens = (args.turns + 1) * (args.steps + 1) + 8
    decodings = {name: Decoding(engine, batch, args.prompt, tokens) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.turns + 1):
        for name in in_turn(decodings, turn):
            milliseconds = decodings[name].milliseconds(args.steps)
            if turn:  # the first one warms up
                times[name].append(milliseconds)
    for decoding in decodings.values():
        decoding.stop()
    return times


def mixed_load(engine, requests: int, small: bool) -> dict[str, float]:
    """Run requests with uneven prompts and answers; return tokens/s and p50 and p99 of inter-token latency in ms."""
    rng = random.Random(0)
    longest = 32 if small else 400
    for index in range(requests):
        ids = [rng.randrange(1, 500) for _ in range(rng.randrange(8, longest))]
        add_request(engine, str(index), ids, rng.randrange(4, longest // 4))
    last: dict[str, float] = {}
    gaps, tokens, begun = [], 0, time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for out in outputs:
            tokens += 1
            if out.request_id in last:
                gaps.append(1e3 * (now - last[out.request_id]))
            last[out.request_id] = now
    gaps.sort()
    seconds = time.perf_counter() - begun
    return {"tokens/s": tokens / seconds, "p50": gaps[len(gaps) // 2], "p99": gaps[int(0.99 * (len(gaps) - 1))]}


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median over turns of the ratio of two engines' times."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def missed_bars(times: dict[str, list[float]], batch: int, device: str) -> list[str]:
    if batch > 4 or not {"vanilla", "naive loops"} <= times.keys():
        return []
    bars = (("vanilla", PLT2_TO_VANILLA[device]), ("naive loops", PLT2_TO_NAIVE))
    rows = [row for row in BOUNDED if row in times]
    found = [(row, other, ratio(times[row], times[other]), bar) for row in rows for other, bar in bars]
    return [f"batch {batch}: {row} takes {got:.2f}x {other}, bar {bar}x" for row, other, got, bar in found if got > bar]


def main() -> int:
    args = parse_arguments()
    keep_engines_here()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict = {
        "device": device,
        "threads": torch.get_num_threads(),
        "compile": args.compile,
        "lora": args.lora,
        "ms": {},
        "mixed": {},
    }
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        make = make_lora_engine if args.lora else make_engine
        engines = {name: make(name, Path(folder) / str(n), args) for n, name in enumerate(args.rows)}
        for batch in args.batch:
            times = decode_times(engines, batch, args)
            figures["ms"][batch] = {name: statistics.median(values) for name, values in times.items()}
            base = args.rows[0]
            for name, value in figures["ms"][batch].items():
                to_base = ratio(times[name], times[base])
                print(f"batch {batch:>2}  {name:<12} {value:8.2f} ms a step  {to_base:5.2f}x {base}", flush=True)
            missed += missed_bars(times, batch, device)
        for name in args.rows if args.requests else []:
            figures["mixed"][name] = found = mixed_load(engines[name], args.requests, args.small)
            print(
                f"mixed     {name:<12} " + ", ".join(f"{key} {value:.1f}" for key, value in found.items()), flush=True
            )
    if args.output:
        args.output.write_text(json.dumps(figures, indent=1) + "\n")
    if args.small:
        return 0
    print("\n".join(missed) or "all bars are held")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
