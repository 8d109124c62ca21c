"""Convert a Hugging Face model to a training checkpoint: an exported PLT, LoopCoder-v2, a dense Llama, Mistral,
Qwen2, Qwen3 or OLMo-2, or a Qwen3-MoE, as it is or as the start of a PLT of several loops.

    plt import --model Qwen3-0.6B --output runs/qwen3 --loop-count 2 --preset recommended

A run starts from it with `include: ../../runs/qwen3/model.yaml` in its configuration (relative to that file).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from plt_megatron.commands import CommandParser, command
from plt_megatron.config import yaml_nodes
from plt_megatron.config.presets import LOOP_PRESETS
from plt_megatron.errors import UserError
from plt_megatron.hf.switches import IMPORT_OPTIONS
from plt_megatron.run_folder.folder import MODEL_YAML
from plt_megatron.run_folder.text import plural


def _arguments(parser: CommandParser) -> None:
    parser.epilog = "The output appears complete or not at all. Exit status: 0 written, 2 something for you to fix."
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="MODEL",
        help="a folder with config.json and safetensors, or a GGUF file",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="CHECKPOINT", help="a new folder, laid out like a run's"
    )
    parser.add_argument(
        "--loop-count",
        type=int,
        metavar="L",
        help="loops (default: the model's own, 1 for a dense one); new gates start at zero",
    )
    parser.add_argument(
        "--preset",
        choices=LOOP_PRESETS,
        help="parameterisation of a one-loop model's new loops; recommended starts with its logits "
        "(default: the paper's, which changes them)",
    )
    for name, option in IMPORT_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **option.argument)
    parser.add_argument(
        "--dtype",
        dest="precision",
        choices=("fp32", "bf16"),
        help="precision of the weights (default: the files'; fp32 for fp16)",
    )


@command("import", __doc__, _arguments, interrupted="interrupted: nothing is written")
def main(arguments: argparse.Namespace) -> None:
    from plt_megatron.config import derived
    from plt_megatron.extras import require
    from plt_megatron.hf import arguments as checks

    checks.prepare_conversion()
    require("plt import", "transformers")
    checks.check_target(arguments.output)
    if checks.is_gguf(arguments.model):
        require("reading a GGUF file", "gguf", "accelerate", "safetensors")
        if not arguments.model.is_file():
            raise UserError(f"{arguments.model}: no such file")
    else:
        checks.check_hf_folder(arguments.model)
    from plt_megatron.hf.importing import ImportOptions, import_model

    given = vars(arguments)
    switches = {name: given.pop(name) for name in IMPORT_OPTIONS}
    result = import_model(ImportOptions(**given, switches=switches))
    loops = plural(result.model.loop_count, "loop")
    print(f"{result.checkpoint}: {result.family}, {loops}, {result.tensors} tensors in {result.precision}")
    if result.fresh:
        print(f"{result.fresh} of them are new, such as gates and scales, initialized as in a new model")
    if result.new_loops and derived.starts_as_one_loop(result.model):
        print("its initial logits are the model's own: later loops change nothing until they are trained")
    elif result.new_loops:
        print("its initial logits are not the model's own; with --preset recommended they are")
    if result.dropped:
        print(f"{result.dropped} tensors of gates or scales are dropped: a one-loop model has none")
    if result.tokenizer is None:
        print("the model has no tokenizer: name one in data.tokenizer")
    include = yaml_nodes.dump({"include": str((result.output / MODEL_YAML).absolute())}).strip()
    print(f"start from it with `{include}`")
