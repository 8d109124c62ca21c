"""Plans: every combination once, targets met and by how much, contradictions between two sweeps in one folder."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from sweep_helpers import LOOPS, plan_of, planned, saved_plan

from plt_megatron.config import derived
from plt_megatron.config.loader import setting
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.errors import UserError
from plt_megatron.experiments.sweep_plan import FILE_NAME, config_path, load_plan, merge
from plt_megatron.predict.decode_cost import decode_cost, decode_milliseconds
from tests.settings import changed


def match_on(what: str) -> str:
    return LOOPS.replace("match_budget: tokens", f"match_budget: {what}")


def first_seed(plan):
    return [run for run in plan.runs if run.seed == 1]


def test_every_combination_with_every_seed_the_first_seed_first(tmp_path):
    plan = plan_of(tmp_path, LOOPS.replace("axes: {", "axes: {model.num_layers: [2, 4], "))
    assert len(plan.runs) == 2 * 3 * 3
    assert [run.seed for run in plan.runs] == [1] * 6 + [2] * 6 + [3] * 6
    run = plan.runs[8]
    assert run.name == "num_layers=2-3_loops-seed2"
    assert (run.config.model.num_layers, run.config.model.loop_count, run.config.training.seed) == (2, 3, 2)
    assert run.folder.path == tmp_path / "sweeps" / "loops" / run.name
    assert (plan.compare, plan.baseline) == ("model.loop_count", "1 loop")


RAMP = ("training.batch_schedule=[{until: 2000, global_batch_size: 2}]", "training.global_batch_size=6")
# A shorter run has fewer long rows: its FLOPs per token are not the whole run's.
GROWING = (
    "data.sequence_length=4096",
    "data.length_schedule=[{until: 1000000, sequence_length: 64}]",
    "training.train_iters=400",
)


@pytest.mark.parametrize(
    ("settings", "tokens", "off"),
    [
        ((), 100 * 64, 64 / 2),
        (RAMP, 32 * (2 * 32 + 6 * 68), 6 * 32 / 2),  # 32 steps end at 2,048 tokens
        (GROWING, 400 * 2 * 4096, 2 * 4096),
    ],
    ids=["half a step", "a batch schedule", "rows that grow"],
)
def test_equal_training_flops_are_equal_within_a_step(tmp_path, settings, tokens, off):
    """`off`: tokens."""
    one, two, three = first_seed(plan_of(tmp_path, match_on("training_flops"), settings))
    assert one.tokens == tokens and one.change == ""
    for run in (two, three):
        assert abs(run.total_flops - one.total_flops) <= off * run.flops_per_token
        assert run.deviation == pytest.approx(run.total_flops / one.total_flops - 1)
        assert run.change == f"tokens {run.tokens:,}"
    assert one.tokens > two.tokens > three.tokens


def test_equal_training_flops_leave_the_learning_rates_clock(tmp_path):
    """In tokens, when steps differ in them: half the tokens are half the schedule, in every run."""
    ramp = ("training.batch_schedule=[{until: 6400, global_batch_size: 2}]", "training.global_batch_size=8")
    length = ("training.train_iters=null", "training.train_tokens=25600")
    runs = first_seed(plan_of(tmp_path, match_on("training_flops"), (*ramp, *length)))
    assert len({run.tokens for run in runs}) == 3
    for run in runs:
        steps = derived.train_iters(run.config)
        for step in (steps // 4, steps // 2, steps):
            tokens = BatchSchedule(run.config).tokens(step) / run.tokens
            assert derived.lr_position(run.config, step) / derived.lr_iters(run.config) == pytest.approx(
                tokens, abs=0.02
            )
    # A decay given in steps counts those of the schedule, too.
    decay = ("optimizer.lr_decay_iters=50", "optimizer.lr_warmup_iters=2")
    for run in first_seed(plan_of(tmp_path, match_on("training_flops"), (*ramp, *length, *decay))):
        assert run.config.optimizer.lr_decay_iters == pytest.approx(derived.lr_iters(run.config) / 2, abs=0.5)


def test_a_curriculum_is_an_axis_and_costs_what_its_stages_cost(tmp_path):
    stages = "[{until: 0.5, loop_count: 1}, {loop_count: 2}]"
    axis = f"axes: {{loops: {{always: {{model.loop_count: 2}}, late: {{training.loop_schedule: {stages}}}}}}}"
    text = match_on("training_flops").replace("axes: {model.loop_count: [1, 2, 3]}", axis)
    always, late = first_seed(plan_of(tmp_path, text, ("model.loop_count=2",)))
    one = dataclasses.replace(always, config=changed(always.config, {"model.loop_count": 1}))
    # An odd number of steps.
    assert late.flops_per_token == pytest.approx((one.flops_per_token + always.flops_per_token) / 2, rel=0.005)
    assert late.deviation == pytest.approx(late.total_flops / always.total_flops - 1)
    assert late.tokens > always.tokens == 100 * 64 and abs(late.deviation) < 0.01


def test_equal_training_flops_let_each_rate_decay_over_its_own_run(tmp_path):
    decays = ("optimizer.lr_decay_iters=100", "optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_iters=20")
    for run in first_seed(plan_of(tmp_path, match_on("training_flops"), decays)):
        steps, optimizer = derived.train_iters(run.config), run.config.optimizer
        assert optimizer.lr_decay_iters == steps and optimizer.lr_wsd_decay_iters == pytest.approx(steps / 5, abs=0.5)


@pytest.mark.parametrize("what", ["training_flops", "parameters", "decode_latency"])
def test_a_rows_own_vocabulary_counts_for_it_alone(tmp_path, what):
    axes = "axes: {rows: {small: {model.vocab_size: 256}, large: {model.vocab_size: 1024}}}"
    text = match_on(what).replace("axes: {model.loop_count: [1, 2, 3]}", axes) + "tolerance: 0.1\n"
    small, large = first_seed(plan_of(tmp_path, text, ("model.hidden_size=64", "model.ffn_hidden_size=1024")))
    amounts = {
        "training_flops": lambda run: run.total_flops,
        "parameters": lambda run: run.parameters,
        "decode_latency": lambda run: decode_milliseconds(run.config.model, run.vocab, 2048, 4, "h100"),
    }
    assert amounts[what](large) / amounts[what](small) - 1 == pytest.approx(large.deviation) and large.change
    assert abs(large.deviation) < 0.1


def test_equal_effective_depth_needs_layers_that_divide(tmp_path):
    plan = plan_of(tmp_path, match_on("effective_depth"), ("model.num_layers=6",))
    assert [run.config.model.num_layers for run in first_seed(plan)] == [6, 3, 2]
    with pytest.raises(
        UserError, match=r"3 loops: effective_depth cannot be held: 4 layers .* do not divide by 3 loops"
    ):
        plan_of(tmp_path, match_on("effective_depth"))
    for what in ("effective_depth", "decode_latency"):
        with pytest.raises(UserError, match=f"{what} is held by changing layers, and model.loop_span would"):
            plan_of(tmp_path, match_on(what), ("model.loop_span=[1, 3]",))


def test_equal_parameters_by_the_width(tmp_path):
    text = """
base: base.yaml
axes: {row: {a: {model.num_layers: 4}, b: {model.num_layers: 3}}}
match_budget: parameters
"""
    a, b = plan_of(tmp_path, text).runs
    assert a.config.model.ffn_hidden_size == 64 and b.config.model.ffn_hidden_size > 64
    assert abs(b.parameters / a.parameters - 1) == pytest.approx(abs(b.deviation)) and abs(b.deviation) < 0.02
    with pytest.raises(UserError, match="parameters cannot be held within 2.0%"):
        plan_of(tmp_path, text.replace("num_layers: 3", "num_layers: 1"))


def test_gates_alone_change_no_width(tmp_path):
    plan = plan_of(tmp_path, match_on("parameters"))
    assert {run.config.model.ffn_hidden_size for run in plan.runs} == {64}
    assert 0 < planned(plan, "2_loops-seed1").deviation < 0.02


def test_equal_latency_on_paper(tmp_path):
    naive = "{model.loop_count: 2, model.cross_loop_parallel: false, model.share_kv: false, model.gated_window: false}"
    axes = f"{{row: {{plain: {{model.loop_count: 1}}, naive: {naive}}}}}"
    text = f"base: base.yaml\naxes: {axes}\nmatch_budget: decode_latency\n"
    plain, naive_run = plan_of(tmp_path, text, ("model.hidden_size=256", "model.ffn_hidden_size=1024")).runs
    assert naive_run.config.model.num_layers < 4
    costs = [
        decode_cost(run.config.model, vocab_size=256, context_length=2048, batch_size=4).milliseconds
        for run in (plain, naive_run)
    ]
    assert costs[1] / costs[0] == pytest.approx(1 + naive_run.deviation) and abs(naive_run.deviation) < 0.02


def test_equal_latency_by_a_measured_table(tmp_path):
    switches = "loop_count,cross_loop_parallel,share_kv,gated_window,full_attention"
    columns = f"num_layers,ffn_hidden_size,{switches},milliseconds"
    rows = ["4,64,1,true,false,false,last_loop,2.0", "4,64,2,true,true,true,every_loop,2.5"]
    rows += ["3,72,2,true,true,true,every_loop,2.01"]
    table = tmp_path / "table.csv"
    table.write_text("\n".join([columns, *rows]) + "\n")
    text = match_on("decode_latency").replace("[1, 2, 3]}", "[1, 2]}") + f"decode: {{table: {table}}}\n"
    two = planned(plan_of(tmp_path, text), "2_loops-seed1")
    assert (two.config.model.num_layers, two.config.model.ffn_hidden_size) == (3, 72)
    assert two.change == "layers 3, FFN width 72" and two.deviation == pytest.approx(0.005)
    wider = text.replace("model.loop_count: [1, 2]}", "size: {1x: {model.loop_count: 1}, 2x: {model.hidden_size: 64}}}")
    windows = "size: {1x: {model.loop_count: 1}, 2x: {model.window_size: 4}, near: {model.window_size: 16}}}"
    for axes, named in (
        (wider, "hidden_size"),
        (
            text.replace("axes: {", "axes: {width: {a: {model.hidden_size: 32}, b: {model.hidden_size: 64}}, "),
            "hidden_size",
        ),
        (text.replace("model.loop_count: [1, 2]}", windows), "window_size"),
    ):
        with pytest.raises(UserError, match=f"cannot tell models of other {named} apart"):
            plan_of(tmp_path, axes)
    topk, loss = "{num_experts: 4, router_topk: 1}", "{num_experts: 4, aux_loss_coeff: 0.5}"
    columnless = {"num_attention_heads": (4, 2), "kv_channels": (8, 16), "vocab_size": (256, 1024), "moe": (topk, loss)}
    columnless |= {"qk_layernorm": ("true", "false"), "norm_placement": ("pre", "post")}
    row = "axes: {{row: {{a: {{model.{0}: {1}}}, b: {{model.{0}: {2}}}}}, "
    for key, values in columnless.items():
        with pytest.raises(UserError, match=f"cannot tell models of other {key} apart"):
            plan_of(tmp_path, text.replace("axes: {", row.format(key, *values)))
    untimed = row.format("moe", loss, loss.replace("0.5", "0.1"))
    assert len(plan_of(tmp_path, text.replace("axes: {", untimed)).runs) == 12
    with pytest.raises(UserError, match="has no row for num_layers 4, ffn_hidden_size 64, loop_count 3"):
        plan_of(tmp_path, text.replace("[1, 2]", "[1, 2, 3]"))
    table.write_text(columns.replace("share_kv,", "") + "\n")
    with pytest.raises(UserError, match="lacks the column"):
        plan_of(tmp_path, text)
    for bad in ("4,64,1", rows[0].replace("4,", "four,", 1), *(rows[0].replace("2.0", ms) for ms in ("0", "nan", "x"))):
        table.write_text("\n".join([columns, rows[1], bad]) + "\n")
        with pytest.raises(UserError, match=r"table.csv:3: .*num_layers.*milliseconds"):
            plan_of(tmp_path, text)
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"table.csv: not UTF-8"):
        plan_of(tmp_path, text)


def test_rows_that_set_their_tokens_do_not_hold_them(tmp_path):
    axes = "{row: {a: {model.loop_count: 1}, b: {training.train_iters: 50}}}"
    text = f"base: base.yaml\naxes: {axes}\nmatch_budget: tokens\n"
    with pytest.raises(UserError, match="b: tokens cannot be held within 2.0%.*-50.0% off"):
        plan_of(tmp_path, text)


def test_a_rows_problem_is_told_with_its_name_and_everybodys_once(tmp_path):
    with pytest.raises(UserError) as raised:
        plan_of(tmp_path, LOOPS.replace("[1, 2, 3]}", "[1, 2, 9]}"))
    assert str(raised.value) == "9 loops: model.loop_count must be at most 8, got 9"
    with pytest.raises(UserError) as raised:
        plan_of(tmp_path, LOOPS, ("model.hidden_size=30",))
    assert str(raised.value).count("\n") == 0 and str(raised.value).startswith("model.hidden_size 30 is not divisible")
    for unmeasured, row in (("validation.loop_counts=[1]", "2 loops: "), ("validation.iters=0", "")):
        with pytest.raises(UserError, match=f"^{row}validation: .*loop_count.*iters"):
            plan_of(tmp_path, LOOPS.replace("[1, 2, 3]}", "[2, 1]}"), (unmeasured,))
    with pytest.raises(UserError, match="unknown key model.loops"):
        plan_of(tmp_path, LOOPS, ("model.loops=3",))


def test_a_plan_reads_back_as_it_was_even_when_moved(tmp_path):
    plan = saved_plan(tmp_path, match_on("training_flops"))
    assert load_plan(plan.folder) == plan
    recorded = plan.folder / FILE_NAME
    recorded.write_text(recorded.read_text().replace("match_budget:", "hold_equal:"))
    assert load_plan(plan.folder) == plan  # made before a key was renamed
    elsewhere = tmp_path / "elsewhere"
    plan.folder.rename(elsewhere)
    moved = load_plan(elsewhere)
    assert planned(moved, "2_loops-seed3").folder.path == elsewhere / "2_loops-seed3"
    assert [dataclasses.replace(run, config=plan.runs[0].config) for run in moved.runs] == [
        dataclasses.replace(run, config=plan.runs[0].config) for run in plan.runs
    ]


def test_more_seeds_and_values_extend_a_sweep(tmp_path):
    saved_plan(tmp_path)
    more = merge(plan_of(tmp_path, LOOPS, ("seeds=[1, 4]", "axes.model.loop_count=[1, 4]")))
    names = {run.name for run in more.runs}
    assert len(more.runs) == len(names) == 9 + 2 + 2 - 1 and {"4_loops-seed4", "3_loops-seed3"} <= names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("training.train_iters=99",), "training.train_iters was 100, is 99"),
        (("match_budget=training_flops",), "match_budget was 'tokens' there, and is 'training_flops' now"),
        (("model.window_size=4", "seeds=[3]"), "1_loop-seed3: model.window_size was 8, is 4"),
        (("baseline=3 loops",), "baseline was '1 loop' there"),
        (
            ("axes.optimizer.lr=[1e-3]",),
            "axes were model.loop_count there, and are model.loop_count x optimizer.lr now",
        ),
    ],
)
def test_two_sweeps_that_contradict_each_other_are_refused(tmp_path, settings, said):
    saved_plan(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        merge(plan_of(tmp_path, LOOPS, settings))


def test_two_axes_that_set_one_key_are_refused(tmp_path):
    """Rows of the first would have the second's value."""
    axes = "axes: {kind: {few: {model.loop_count: 2}, many: {model.loop_count: 3}}, "
    with pytest.raises(UserError, match=r"axes\.model\.loop_count: model\.loop_count is also set by axes\.kind"):
        plan_of(tmp_path, LOOPS.replace("axes: {", axes))


@pytest.mark.parametrize("first", [True, False])
def test_an_axis_that_sets_a_section_meets_one_that_sets_a_key_of_it(tmp_path, first):
    """A row of dense models would have experts."""
    ffn = "ffn: {dense: {model.moe: null}, experts: {model.moe.num_experts: 4}}"
    axes = [ffn, "model.moe.router_topk: [1, 2]"][:: 1 if first else -1]
    with pytest.raises(UserError, match=r"model\.moe(\.router_topk)? is also set by axes"):
        plan_of(tmp_path, LOOPS.replace("axes: {", f"axes: {{{', '.join(axes)}, "))


@pytest.mark.parametrize("name", ["depth #1", "x: y", "two: ", "小 😀", "[a]"])
def test_a_folder_of_any_name_holds_its_runs(tmp_path, name):
    """YAML would take part of it for a comment or a mapping."""
    plan = plan_of(tmp_path, LOOPS, (setting("name", name),))
    assert {run.folder.path.parent for run in plan.runs} == {plan.folder} == {tmp_path / "sweeps" / name}


@pytest.mark.parametrize(
    ("first", "second"),
    [("A B", "a_b"), ("+ KV sharing", "KV sharing"), ("小", "大"), (".5x", "5x")],
    ids=["case", "sign", "letters", "dot"],
)
def test_two_rows_of_one_folder_are_refused(tmp_path, first, second):
    axis = f'size: {{"{first}": {{model.num_layers: 2}}, "{second}": {{model.num_layers: 4}}}}'
    with pytest.raises(UserError, match=re.escape(f"'{first}' and '{second}' would both be ")):
        plan_of(tmp_path, LOOPS.replace("model.loop_count: [1, 2, 3]", axis))


def test_a_sweep_narrowed_by_the_command_line_keeps_its_questions(tmp_path):
    text = LOOPS + "questions: {the second: [2 loops, 1 loop], the third: [3 loops, 2 loops]}\n"
    plan = saved_plan(tmp_path, text)
    narrowed = merge(plan_of(tmp_path, text, ("axes.model.loop_count=[1, 2]",)))
    assert narrowed.questions == plan.questions and len(narrowed.runs) == 9
    with pytest.raises(UserError, match="questions.the fourth: '4 loops' is not one of"):
        plan_of(tmp_path, text.replace("the third: [3", "the fourth: [4"), ("seeds=[1]",))


def test_a_sweep_without_axes_is_called_by_its_loops(tmp_path):
    plan = plan_of(tmp_path, "base: base.yaml\nset: {model.loop_count: 2}\n")
    assert [run.row() for run in plan.runs] == ["2 loops"]


def test_a_plan_that_lost_a_configuration_says_so(tmp_path):
    plan = saved_plan(tmp_path)
    lost = config_path(plan, plan.runs[4])
    lost.unlink()
    with pytest.raises(UserError) as caught:
        load_plan(plan.folder)
    assert str(caught.value).startswith(f"{lost} is missing, although sweep.yaml names it: restore it, or remove ")
    (plan.folder / FILE_NAME).unlink()
    assert merge(plan_of(tmp_path)) == plan


def test_a_folder_without_a_plan_or_with_a_broken_one(tmp_path):
    with pytest.raises(UserError, match="is not a sweep"):
        load_plan(tmp_path)
    plan = saved_plan(tmp_path)
    content = yaml.safe_load((plan.folder / FILE_NAME).read_text())
    del content["runs"][0]["seed"]
    for broken in (yaml.safe_dump(content).encode(), b"name: caf\xe9\n"):
        (plan.folder / FILE_NAME).write_bytes(broken)
        with pytest.raises(UserError, match="not a sweep's plan"):
            load_plan(plan.folder)
