"""Files that the safetensors library reads, and files it wrote; broken ones are named."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plt_megatron.errors import UserError
from plt_megatron.hf.arguments import parse_size
from plt_megatron.hf.safetensors_files import INDEX, SINGLE, SafetensorsFolder, SafetensorsWriter

TENSORS = {f"layer.{i}.weight": torch.randn(3 + i, 5) for i in range(5)} | {"norm": torch.randn(7)}


def write(folder, dtype=torch.float32, max_shard_size=1 << 30, tensors=TENSORS):
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(folder, shapes, dtype, max_shard_size)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_is_what_the_library_reads(tmp_path, dtype):
    writer = write(tmp_path, dtype)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    loaded = load_file(tmp_path / SINGLE)
    assert list(loaded) and loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name].to(dtype)) for name in TENSORS)
    assert writer.total_size == sum(tensor.numel() for tensor in TENSORS.values()) * dtype.itemsize
    with safe_open(tmp_path / SINGLE, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files without


def test_shards_keep_to_their_size_and_the_index_finds_everything(tmp_path):
    write(tmp_path, max_shard_size=150)
    index = json.loads((tmp_path / INDEX).read_text())
    found = {}
    for name in set(index["weight_map"].values()):
        shard = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 150 or len(shard) == 1
        found |= dict.fromkeys(shard, name)
    assert found == index["weight_map"] and found.keys() == TENSORS.keys()
    assert {path.name for path in tmp_path.iterdir()} == {*found.values(), INDEX}
    assert "model-00001-of-00005.safetensors" in found.values()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_no_tensor_is_kept_in_memory(tmp_path):
    alive = weakref.WeakSet()
    shapes = [(f"t{i}", (100, 100)) for i in range(20)]
    writer = SafetensorsWriter(tmp_path, shapes, torch.float32, 1 << 30)
    for name, shape in shapes:
        tensor = torch.zeros(shape)
        alive.add(tensor)
        writer.write(name, tensor)
        assert len(alive) <= 2


def test_what_the_library_wrote(tmp_path):
    mixed = {"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "c": torch.randn(2, 2).half()}
    save_file(mixed, tmp_path / SINGLE, metadata={"format": "pt"})
    files = SafetensorsFolder(tmp_path)
    assert files.dtypes == {"a": "F32", "b": "BF16", "c": "F16"}
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in mixed.items()}
    assert all(torch.equal(files.read(name), mixed[name]) for name in mixed)


def truncate(shard, other):
    shard.write_bytes(shard.read_bytes()[:-4])


def garble(shard, other):
    shard.write_bytes(shard.read_bytes().replace(b'"shape"', b'"shapf"', 1))


def test_an_index_of_a_former_save_is_passed_over(tmp_path):
    """`save_pretrained` into a folder of shards removes them, but not their index."""
    write(tmp_path, max_shard_size=150)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    write(tmp_path, tensors={"norm": torch.ones(7)})
    assert torch.equal(SafetensorsFolder(tmp_path).read("norm"), torch.ones(7))


BROKEN = {
    "shorter": (truncate, r"model-00002-.*: not a safetensors file, or a damaged one"),
    "header cut": (lambda shard, other: shard.write_bytes(shard.read_bytes()[:20]), "model-00002-.*: not a safetens"),
    "header garbled": (garble, "model-00002-.*: not a safetensors file"),
    "empty": (lambda shard, other: shard.write_bytes(b""), "model-00002-.*: not a safetensors file"),
    "another kind": (lambda shard, other: shard.write_bytes(b"not safetensors at all"), "model-00002-.*: not a safet"),
    "twice": (
        lambda shard, other: shard.write_bytes(other.read_bytes()),
        "model-00002-.*: .* is in model-00001-.* as ",
    ),
    "other tensors": (lambda shard, other: save_file({"other": torch.zeros(2)}, shard), "is not in model-00002-"),
    "gone": (lambda shard, other: shard.unlink(), f"model-00002-.* is missing, which {INDEX} names"),
    "deep index": (lambda shard, other: shard.with_name(INDEX).write_text("[" * 100_000), f"{INDEX} is not valid JSON"),
    "other index": (lambda shard, other: shard.with_name(INDEX).write_text("{}"), f"{INDEX}: not a safetensors index"),
    "index": (lambda shard, other: shard.with_name(INDEX).write_text("[]"), f"{INDEX} is not a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_named(tmp_path, name):
    write(tmp_path, max_shard_size=150)
    other, shard = sorted(tmp_path.glob("model-*"))[:2]
    harm, message = BROKEN[name]
    harm(shard, other)
    with pytest.raises(UserError, match=message) as refused:
        SafetensorsFolder(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_safetensors_is_named(tmp_path):
    with pytest.raises(UserError, match=f"has neither {SINGLE} nor {INDEX}$"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin: save the model as safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5k", 1500), ("123", 123), ("64kib", 65536)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "1e9", "5iB", "1" * 400])
def test_no_sizes(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)
