"""Check that a checkpoint can continue with a configuration, by its progress.json alone, before torch is imported.

The training loop repeats the checks with the checkpoint's tensors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.branching import branch_settings, decay_steps
from plt_megatron.config.fields import from_plain, unknown_keys
from plt_megatron.config.loader import load_config, setting
from plt_megatron.config.loop_schedule import stages_of
from plt_megatron.config.presets import LOOP_PRESETS, OF_ONE_LOOP
from plt_megatron.config.rules.optimizer import find_decay_problems, settings_of_others
from plt_megatron.config.rules.uploads import is_url
from plt_megatron.config.schema import ModelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.model.parameters import Sizes, tensors_of
from plt_megatron.run_folder import checkpoints
from plt_megatron.run_folder.folder import MODEL_YAML, RunFolder

_FOLLOWING = ("optimizer.lr_decay_iters", "optimizer.lr_wsd_decay_iters")  # if unset, derived from the run's length
_LENGTHS = ("train_iters", "train_tokens")
_MOST_LINES = 3
_FROM_WEIGHTS = (
    "restore that, or start a run of another name from its weights alone with checkpoint.load and "
    "checkpoint.weights_only=true"
)


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run would start from.

    Attributes:
        progress: the checkpoint's record of its run.
        is_own: whether the run resumes its own checkpoint; else it starts from that of `checkpoint.load`.
    """

    path: Path
    progress: dict[str, Any]
    is_own: bool


def find_start(config: RunConfig) -> Start | None:
    """Find the checkpoint that a run would start from, checking file sizes only. None: there is none yet, it has to be
    downloaded, or it is damaged, which the training loop reports. Raises `UserError` if the run has some but is to save
    none, since it would begin anew in the same folder."""
    settings, own = config.checkpoint, RunFolder.of(config).checkpoints
    is_own = bool(checkpoints.candidates(own))
    if is_own and not settings.enabled:
        raise UserError(
            f"{own} has checkpoints of this run, which checkpoint.enabled=false would train from the beginning, and "
            "empty its metrics.jsonl: give it another name"
        )
    if not is_own and (settings.load is None or is_url(settings.load)):
        return None
    try:
        path = checkpoints.latest_of_full_size(own if is_own else Path(settings.load or ""))
        start = None if path is None else Start(path, checkpoints.read_verified_progress(path), is_own)
        if start is not None and is_own and start.progress.get("weights_only"):
            raise UserError(f"{own} has the weights of an import or average, no run's: give the run another name")
        return start
    except UserError:
        raise
    except (OSError, ValueError, KeyError):
        return None


def start_problems(start: Start, config: RunConfig, vocab_size: int | None) -> list[str]:
    """List why a checkpoint cannot continue with a configuration's model and schedule, or has nothing left to train;
    `vocab_size` None: unknown."""
    checks = [partial(check_model, start, config, vocab_size)]
    if start.is_own or not config.checkpoint.weights_only:
        allow_other = config.checkpoint.allow_other_schedule
        checks.append(partial(check_schedule, start.path, start.progress, config, allow_other=allow_other))
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += str(error).splitlines()
    nothing_left = not start.is_own and not config.checkpoint.weights_only and is_finished(config, start.progress)
    if nothing_left and not problems:
        problems.append(
            f"checkpoint.load: {start.path} is at step {start.progress['step']:,}, this run's last: nothing is left to "
            "train; add checkpoint.weights_only=true to start from its weights alone, or give a higher "
            "training.train_iters or train_tokens"
        )
    return problems


def is_finished(config: RunConfig, progress: dict[str, Any]) -> bool:
    """Return whether a run of this configuration has nothing left to train after a checkpoint."""
    step = progress["step"]
    return step >= derived.last_step(config, step, checkpoints.trained_tokens(progress))


# ---------------------------------------------------------------- the schedule


def schedule(config: RunConfig, step_tokens: int) -> dict[str, Any]:
    """Return the settings that decide how the weights change, by their names in the configuration, `None`s resolved.
    `step_tokens`: tokens that the learning rate schedule counts as one step."""
    others = settings_of_others(config.optimizer)
    settings = {name: value for name, value in dataclasses.asdict(config.optimizer).items() if name not in others}
    settings["lr_decay_iters"] = derived.lr_decay_iters(config, step_tokens)
    is_wsd = config.optimizer.lr_decay_style == "WSD"
    settings["lr_wsd_decay_iters"] = derived.lr_wsd_decay_iters(config, step_tokens) if is_wsd else None
    stages = [dataclasses.asdict(stage) for stage in config.training.loop_schedule]
    loops = {
        "training.loop_schedule": stages,
        "training.loop_loss_weights": config.training.loop_loss_weights,
        "training.z_loss_coeff": config.training.z_loss_coeff,
        "model.mup_base_hidden_size": config.model.mup_base_hidden_size,
    }
    if len(stages_of(config)) > 1:  # they end at shares of it
        length = config.training.train_iters if config.training.train_tokens is None else config.training.train_tokens
        loops["training.loop_schedule over"] = length
    factors = {name: settings.pop(name) for name in ("lr_mult", "wd_mult")}
    settings |= {f"{name}.{kind}": value for name, kinds in factors.items() for kind, value in kinds.items()}
    return {f"optimizer.{name}": value for name, value in settings.items()} | loops


def schedule_step_tokens(progress: dict[str, Any]) -> int:
    """Return the tokens that a checkpoint's schedule counts as one step; if not recorded, those of its own steps."""
    if "schedule_step_tokens" in progress:
        return progress["schedule_step_tokens"]
    return progress["config"]["training"]["global_batch_size"] * progress["config"]["data"]["sequence_length"]


def check_schedule(path: Path, progress: dict[str, Any], config: RunConfig, *, allow_other: bool) -> None:
    """Raise `UserError` if a checkpoint was trained with another optimizer or, unless allowed, another schedule; or if
    the schedule leaves no steps to decay, or no samples for the rest."""
    for problem in (
        *find_decay_problems(config, schedule_step_tokens(progress)),
        *_find_order_problems(config, progress),
    ):
        raise UserError(problem)
    own = schedule(config, schedule_step_tokens(progress))
    before, now = progress["schedule"].get("optimizer.name", "adam"), own["optimizer.name"]  # formerly always Adam
    if before != now:
        raise UserError(
            f"checkpoint {path} was trained with optimizer.name {before} (now {now}), whose state no other optimizer "
            f"can use; {_FROM_WEIGHTS}"
        )
    patterns = progress["config"]["training"].get("trainable", [])  # formerly all parameters
    if patterns != config.training.trainable:
        raise UserError(
            f"checkpoint {path} was trained with training.trainable {patterns} (now {config.training.trainable}), and "
            f"has optimizer state of those parameters alone; {_FROM_WEIGHTS}"
        )
    if allow_other:
        return
    defaults = schedule(RunConfig(training=TrainingConfig(train_iters=1)), 1)
    added = ("training.z_loss_coeff", "model.mup_base_hidden_size")
    later = {name: value for name, value in defaults.items() if "_mult." in name or name in added}
    saved = later | progress["schedule"]  # a checkpoint from before these settings has their defaults
    if "training.loop_loss_weights" in saved:
        saved["training.loop_loss_weights"] = _loss_weights(progress["config"], config)
    other = {name: saved[name] for name, value in own.items() if name in saved and saved[name] != value}
    if config.optimizer.lr_decay_style == "constant" and "optimizer.lr_decay_style" not in other:
        other.pop("optimizer.lr_decay_iters", None)  # a constant rate does not depend on it
    if other:
        raise UserError(_describe(path, progress, config, other, own))


def _find_order_problems(config: RunConfig, progress: dict[str, Any]) -> Iterator[str]:
    order = config.data.order_samples
    if order is None:
        return
    step, tokens = progress["step"], checkpoints.trained_tokens(progress)
    samples = (tokens + derived.tokens_left(config, step, tokens)) // config.data.sequence_length
    if samples > order:
        yield f"data.order_samples {order:,}: the run reads {samples:,} samples in all; give as many"


def _loss_weights(saved: dict[str, Any], config: RunConfig) -> list[float]:
    """Return the `loop_loss_weights` of a checkpoint's configuration, or the run's own if both mean the same."""
    before, now = saved["training"]["loop_loss_weights"], config.training.loop_loss_weights
    training = dataclasses.replace(config.training, loop_loss_weights=before)
    meant = derived.loop_loss_weights(dataclasses.replace(config, training=training), saved["model"]["loop_count"])
    return now if meant == derived.loop_loss_weights(config, config.model.loop_count) else before


def _describe(
    path: Path, progress: dict[str, Any], config: RunConfig, other: dict[str, Any], own: dict[str, Any]
) -> str:
    """Describe what differs, by the settings that the user typed, and what to type for each possible intention."""
    length = _other_length(progress["config"]["training"], config)
    unset = {f"optimizer.{name}" for name, value in vars(config.optimizer).items() if value is None}
    follow = [name for name in other if length and name in _FOLLOWING and name in unset]
    differences = [f"{name} {value} (now {own[name]})" for name, value in other.items() if name not in follow]
    if follow:
        differences.insert(0, f"{length}, from which {' and '.join(follow)} follow{'' if follow[1:] else 's'}")
    run, is_own = path.parent.parent, path.parent.resolve() == RunFolder.of(config).checkpoints.resolve()
    if is_own and is_finished(config, progress):
        lines = [f"{run} is finished: step {progress['step']}, trained with {', '.join(differences)}; restore that, or"]
    else:
        lines = [f"checkpoint {path} was trained with {', '.join(differences)}; restore that, or add"]
        redrawn = " checkpoint.allow_other_data=true" if length and _draws_anew(progress, config) else ""
        lines.append(f"  to continue with the new schedule: checkpoint.allow_other_schedule=true{redrawn}")
        if follow == list(other) and config.optimizer.min_lr > 0:
            before = " ".join(f"{name}={other[name]}" for name in follow)
            lines.append(f"  to keep the rate at optimizer.min_lr {config.optimizer.min_lr:g}: {before}{redrawn}")
    if len(lines) < _MOST_LINES:
        name = "name=NEW " if is_own else ""
        lines.append(f"  to start a run from its weights: {name}checkpoint.load={path} checkpoint.weights_only=true")
    return "\n".join(lines)


def _other_length(saved: dict[str, Any], config: RunConfig) -> str | None:
    """Describe how the run's length has changed, by the settings that give it; None if it has not."""
    before, now = (
        {name: length[name] for name in _LENGTHS if length.get(name) is not None}
        for length in (saved, dataclasses.asdict(config.training))
    )
    if before == now or not before:
        return None
    (old, steps), (new, others) = *before.items(), *now.items()
    return f"training.{old} {steps} (now {others if old == new else f'training.{new} {others}'})"


def _draws_anew(progress: dict[str, Any], config: RunConfig) -> bool:
    """Return whether the new run length changes the order of samples without checkpoint.allow_other_data."""
    drawn = checkpoints.order_samples(progress)
    return not config.checkpoint.allow_other_data and drawn not in (None, derived.order_samples(config))


# ---------------------------------------------------------------- the model


def check_vocabulary(path: Path, progress: dict[str, Any], vocab_size: int) -> None:
    """Raise `UserError` if a checkpoint's vocabulary, without padding, has another size."""
    saved = progress["vocab_size"]
    if saved != vocab_size:
        raise UserError(
            f"checkpoint {path}: its vocabulary has {saved} entries, this run's {vocab_size}; use its tokenizer"
        )


def check_model(start: Start, config: RunConfig, vocab_size: int | None) -> None:
    """Raise `UserError` if a checkpoint's tensors do not fit this model, or if a run's own is of another form of the
    loop. Either may lack all gates, as with one loop. `vocab_size` is the run's, without padding; None: unknown."""
    if vocab_size is not None:
        check_vocabulary(start.path, start.progress, vocab_size)
    settings = start.progress["config"]["model"]
    if unknown_keys(ModelConfig, settings):  # from another version
        return
    saved, own = from_plain(ModelConfig, settings), config.model
    fits, form = _fit(saved, own), _changes_of_form(saved, own)
    if fits and not (form and start.is_own):
        return
    changed = [item.name for item in dataclasses.fields(saved) if getattr(saved, item.name) != getattr(own, item.name)]
    causes = [
        name
        for name in changed
        if name in form or _shapes(own) != _shapes(dataclasses.replace(own, **{name: getattr(saved, name)}))
    ]
    differences = [f"model.{name} {getattr(saved, name)} (now {getattr(own, name)})" for name in causes]
    shapes = "" if fits else ", and has tensors of other shapes"
    raise UserError(
        f"checkpoint {start.path} was trained with {', '.join(differences)}{shapes}; restore that{_ways(start, config)}"
    )


def _ways(start: Start, config: RunConfig) -> str:
    """Return where the settings of a checkpoint's model are, if in a file, and how to train another model."""
    if start.is_own:
        return f", as in {RunFolder.of(config).config_file}, or start a run of another name"
    imported = start.path.parent.parent / MODEL_YAML
    return f"{f' (include {imported})' if imported.is_file() else ''}, or leave checkpoint.load out"


def _changes_of_form(saved: ModelConfig, own: ModelConfig) -> list[str]:
    """Return the settings of presets, which another version may have expanded otherwise, and the span of the loops if
    they differ with effect."""
    have_loops = min(saved.loop_count, own.loop_count) > 1
    names = LOOP_PRESETS["paper"].keys() if have_loops else OF_ONE_LOOP
    span = ["loop_span"] * (have_loops and derived.looped_layers(saved) != derived.looped_layers(own))
    return [name for name in names if getattr(saved, name) != getattr(own, name)] + span


def _fit(saved: ModelConfig, own: ModelConfig) -> bool:
    before, now = _shapes(saved), _shapes(own)
    if any(before[name] != now[name] for name in before.keys() & now.keys()):
        return False
    loops = [{item.name for item in tensors_of(model) if item.only_in_loops} for model in (saved, own)]
    return before.keys() - loops[0] == now.keys() - loops[1] and (loops[0] == loops[1] or not all(loops))


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter and buffer, preceded by the layers that have one and the number of experts."""
    sizes = Sizes.of(model, 1)
    return {
        item.name: (*item.layers(model), sizes.experts * item.per_expert, *sizes.shape(item.dims))
        for item in tensors_of(model)
    }


# Decay branches of existing runs.


def add_branch_options(parser: argparse._ActionsContainer) -> None:
    """Add --branch-from and --decay-steps, for `branch_config`."""
    parser.add_argument(
        "--branch-from",
        metavar="RUN@STEP",
        help="instead of CONFIG.yaml: start the decay of a WSD run from this checkpoint, in a new run folder",
    )
    parser.add_argument(
        "--decay-steps", type=int, metavar="N", help="length of --branch-from's decay (default: a tenth of the branch)"
    )


def branch_config(source: str, settings: Sequence[str], decay: int | None = None) -> RunConfig:
    """Return the configuration of a decay branch of a run: of `source`, `RUN@STEP`, a run's folder and the step of one
    of its checkpoints, with `key=value` overrides and `decay` steps (None: a tenth of the branch's length).

    Raises:
        UserError: there is no such checkpoint, the run's rate is not constant there, or a setting is invalid.
    """
    name, at, text = source.rpartition("@")
    if not at or not text.isdigit():
        raise UserError(f"--branch-from {source}: expected RUN@STEP, as in runs/trunk@2000")
    if settings and "=" not in settings[0]:
        raise UserError(f"--branch-from {source} takes its configuration from its run, not from {settings[0]}")
    if decay is not None and decay < 1:
        raise UserError(f"--decay-steps must be at least 1, got {decay}")
    folder, step = RunFolder(name), int(text)
    trunk = folder.config()
    try:
        checkpoint = folder.checkpoint_at(step)
    except UserError as error:
        raise UserError(f"{error}; a branch that has begun continues with plt train BRANCH/config.yaml") from error
    drawn = clock = None
    with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: loading it will report it
        progress = checkpoints.read_verified_progress(checkpoint)
        drawn = checkpoints.order_samples(progress)
        clock = checkpoints.trained_tokens(progress), schedule_step_tokens(progress)
    own = branch_settings(trunk, str(checkpoint), step, decay or decay_steps(step), drawn, clock)
    defaults = [setting("name", f"{trunk.name}_branch_{step}"), setting("output_dir", folder.path.parent)]
    config = load_config(folder.config_file, [*defaults, *own, *settings], accept_old_names=True)
    if RunFolder.of(config).path.resolve() == folder.path.resolve():
        raise UserError(f"--branch-from {source}: the branch needs a name of its own: name=...")
    start = find_start(config)
    if start is not None and start.is_own:  # a branch that has begun, unless this is another one
        given = any(setting.startswith("checkpoint.allow_other_schedule=") for setting in settings)  # its own is true
        allow_other = given and config.checkpoint.allow_other_schedule
        check_schedule(start.path, start.progress, config, allow_other=allow_other)
    return config
