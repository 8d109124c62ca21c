"""LoRA adapters as peft writes them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_adapter(folder: Path, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: int) -> None:
    """Write an adapter that adds alpha / r * B A to the weights of linear layers.

    Args:
        pairs: layer's name in the model -> (A [r, in_features], B [out_features, r]).
    """
    tensors = {}
    for name, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    targets = sorted({name.rpartition(".")[2] for name in pairs})
    (rank,) = {a.shape[0] for a, _ in pairs.values()}
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
