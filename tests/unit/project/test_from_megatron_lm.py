"""docs/from_megatron_lm.md: its arguments are upstream's, its settings ours, and what is commonly used is all there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from plt_megatron.config.fields import REFUSED, field_types
from plt_megatron.config.schema import RunConfig
from tests.fuzz import draw
from tests.running import ROOT

PAGE = ROOT / "docs" / "from_megatron_lm.md"
LIST = ROOT / "tests" / "fixtures" / "megatron_lm_arguments.txt"
VERDICTS = {"always", "never", "refused"}
# megatron-core's configurations, where most arguments end up.
CORE = {
    "transformer/transformer_config.py": ("TransformerConfig",),
    "model_parallel_config.py": ("ModelParallelConfig",),
    "optimizer/optimizer_config.py": ("OptimizerConfig",),
    "distributed/distributed_data_parallel_config.py": ("DistributedDataParallelConfig",),
}
# Settings named for an argument that is of Megatron-LM's training program alone.
PROGRAMS_OWN = """
    split micro_batch_size global_batch_size train_iters seed lr_decay_style lr_warmup_iters lr_decay_iters
    lr_wsd_decay_iters lr_wsd_decay_style load save_interval async_save log_interval wandb_project profile_step_start
    profile_step_end profile_ranks rotary_base rope_scaling_factor vocab_size make_vocab_size_divisible_by
    distributed_timeout_minutes distributed_timeout_seconds_after_init eod_mask_loss fim_rate fim_spm_rate
    yarn_original_max_position_embeddings yarn_beta_fast
    yarn_beta_slow yarn_correction_range_round_to_int num_experts fp8_format
""".split()
# What upstream's scripts leave at its default, but many a user's do not.
ALSO_COMMON = """
    --context-parallel-size --cp-comm-type --num-layers-per-virtual-pipeline-stage --expert-tensor-parallel-size
    --add-qkv-bias --qk-layernorm --norm-epsilon --make-vocab-size-divisible-by --rope-scaling-factor --window-size
    --reset-position-ids --reset-attention-mask --eod-mask-loss --train-data-path --valid-data-path --mock-data
    --rampup-batch-size --train-samples --seed --lr-warmup-iters --lr-wsd-decay-iters --lr-wsd-decay-style
    --override-opt-param-scheduler --exit-duration-in-mins --exit-signal-handler --optimizer --adam-eps --sgd-momentum
    --start-weight-decay --decoupled-lr --finetune --no-load-optim --no-load-rng --ckpt-step --async-save --ckpt-format
    --use-checkpoint-args --dist-ckpt-strictness --non-persistent-save-interval --fp16 --fp8-format --fp8-recipe
    --fp8-param-gather --first-last-layers-bf16 --deterministic-mode --recompute-granularity --recompute-method
    --recompute-num-layers --recompute-modules --recompute-activations --distribute-saved-activations
    --cross-entropy-loss-fusion --no-rope-fusion --no-gradient-accumulation-fusion --cuda-graph-impl --tp-comm-overlap
    --cpu-offloading-num-layers --optimizer-cpu-offload --use-precision-aware-optimizer --use-megatron-fsdp
    --moe-shared-expert-intermediate-size --moe-z-loss-coeff --moe-expert-capacity-factor --moe-router-pre-softmax
    --moe-router-enable-expert-bias --moe-layer-freq --moe-ffn-hidden-size --wandb-exp-name --timing-log-level
    --log-params-norm --profile --profile-ranks --fim-rate --full-validation --save-retain-interval
""".split()


def upstream(path: Path = LIST) -> dict[str, bool]:
    """Each argument of upstream -> whether its pretraining scripts use it."""
    lines = (line.partition(" ") for line in path.read_text(encoding="ascii").splitlines() if line[:1] == "-")
    return {name: mark == "*" for name, _, mark in lines}


def rows(text: str) -> list[tuple[list[str], str, str]]:
    """(arguments, second column, remark) of the tables."""
    tables = text.split("<!-- arguments: checked by a test -->")[1]
    cells = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| `--")]
    return [(re.findall(r"`(--[^`]+)`", first), second, " ".join(rest).rstrip(" |")) for first, second, *rest in cells]


ROWS = rows(PAGE.read_text(encoding="utf-8"))
COVERED = {argument for arguments, _, remark in ROWS for argument in (*arguments, *re.findall(r"`(--[^`]+)`", remark))}


SETTINGS = {key for key, _ in draw.leaves()}


def named_settings(cell: str) -> list[str]:
    return re.findall(r"`([a-z]\w*(?:\.\w+)*)`", cell)


def core_fields() -> set[str]:
    """The fields of megatron-core's configurations, read without importing them."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = next(path for path in map(Path, spec.submodule_search_locations) if (path / "core").is_dir()) / "core"
    found = set()
    for file, classes in CORE.items():
        tree = ast.parse((folder / file).read_text(encoding="utf-8"))
        found |= {
            item.target.id
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name in classes
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
    return found


def named_for(setting: str) -> str | None:
    """The argument of upstream that a setting has the name of."""
    parts = setting.replace("_", "-").split(".")
    # In a section of its own a setting lacks upstream's prefix: moe-, yarn-, fp8-, rope-scaling-.
    names = [parts[-1]] if len(parts) < 3 else ["-".join(parts[-2:]), parts[-1]]
    return next((name for each in names for name in (f"--{each}", f"--no-{each}") if name in upstream()), None)


def test_the_list_of_upstreams_arguments_is_whole():
    assert len(upstream()) > 800 and sum(upstream().values()) > 90


def test_arguments_are_upstreams():
    assert len(COVERED) > 250
    assert COVERED - upstream().keys() == set()


def test_each_argument_has_one_row():
    # A sequence's length is of the model and of the data.
    arguments = [argument for row, _, _ in ROWS for argument in row]
    assert {argument for argument in arguments if arguments.count(argument) > 1} == {"--seq-length"}


def test_settings_are_ours():
    for arguments, second, _ in ROWS:
        named = named_settings(second)
        assert named or second in VERDICTS, (arguments, second)
        assert set(named) <= SETTINGS, (arguments, second)
    dotted = re.findall(r"`(\w+\.\w+)[`=]", PAGE.read_text(encoding="utf-8"))
    assert len(dotted) > 100
    assert {name for name in dotted if name.partition(".")[0] in field_types(RunConfig)} <= SETTINGS


@pytest.mark.parametrize("chosen", ["scripts", "also common"])
def test_what_is_commonly_used_is_covered(chosen):
    wanted = {name for name, common in upstream().items() if common} if chosen == "scripts" else set(ALSO_COMMON)
    assert wanted - COVERED == set()


def test_a_setting_with_an_arguments_name_stands_beside_it():
    """So a new setting of such a name is refused here until its row is written."""
    beside = {argument: named_settings(second) for arguments, second, _ in ROWS for argument in arguments}
    for setting in SETTINGS:
        argument = named_for(setting)
        if argument is not None:
            assert setting in beside.get(argument, []), f"{argument} has no row that says {setting}"


def test_settings_with_an_arguments_name_are_megatron_cores():
    core = core_fields()
    assert len(core) > 300
    named = {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in map(named_for, SETTINGS) if name}
    assert named - core == set(PROGRAMS_OWN)
    # Arguments have another name than the field, ours has the field's.
    assert {"layernorm_epsilon", "num_moe_experts", "apply_rope_fusion", "fp8"} <= core


def test_what_the_schema_refuses_is_refused_here():
    refused = {argument for arguments, second, _ in ROWS if second == "refused" for argument in arguments}
    names = {f"--{name.replace('_', '-')}" for name in REFUSED} | {f"--no-{name.replace('_', '-')}" for name in REFUSED}
    assert refused <= names
    assert names & upstream().keys() <= refused


def test_a_wrong_row_is_found():
    """The checks can fail: an invented argument, an invented setting."""
    page = "<!-- arguments: checked by a test -->\n| `--num-leyers`, `--lr` | `model.num_leyers` | as `--clip-grad` |\n"
    ((arguments, second, remark),) = rows(page)
    assert arguments == ["--num-leyers", "--lr"] and remark == "as `--clip-grad`"
    assert set(arguments) - upstream().keys() == {"--num-leyers"}
    assert not set(named_settings(second)) <= SETTINGS
