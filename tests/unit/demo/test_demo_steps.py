"""Steps that run once: when they are skipped, continued, or run again from the start."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from plt_megatron.demo import steps
from plt_megatron.demo.steps import Step, run_step
from plt_megatron.errors import UserError


class Work:
    """A step with one input and two outputs, which counts its runs and notes what it found when it began."""

    def __init__(self, folder):
        self.source, self.file, self.tree = folder / "source", folder / "out.bin", folder / "out"
        self.stamps = folder / "stamps"
        self.source.write_text("text")
        self.runs, self.found, self.fail = 0, [], False
        self.step = Step("work", "the work", "size=1", [self.source], [self.file, self.tree], self.do)

    def do(self):
        self.runs += 1
        self.found.append(self.file.exists())
        self.file.write_text("half")
        if self.fail:
            raise KeyboardInterrupt
        self.file.write_text("whole")
        self.tree.mkdir(exist_ok=True)
        (self.tree / "a").write_text("1234")

    def go(self, is_read=False, **changes):
        return run_step(dataclasses.replace(self.step, **changes), self.stamps, 1, 1, is_read)


def changes_below(folder):
    """What changes with a file or its content, by path; reading it, which sets its `st_atime`, is no change."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {
        path: (stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for path, stat in found.items()
    }


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


def test_done_work_is_not_done_again(work, capsys):
    first = work.go()
    second = work.go()
    assert work.runs == 1
    assert second == first and first.finished
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda work: work.source.write_text("other text"),
        lambda work: work.file.unlink(),
        lambda work: work.file.write_text("cut"),
        lambda work: (work.tree / "a").unlink(),
        lambda work: (work.tree / "b").write_text("more"),
        lambda work: (work.stamps / "work.json").unlink(),
        lambda work: (work.stamps / "work.json").write_text("{"),
        lambda work: (work.stamps / "work.json").write_text('{"other": 1}'),
    ],
)
def test_what_has_changed_is_done_anew_on_a_clean_place(work, change):
    work.go()
    change(work)
    work.go()
    assert work.runs == 2
    assert work.found == [False, False]
    assert not (work.tree / "b").exists()


def test_what_others_put_beside_the_outputs_is_theirs(work):
    """As `plt diagnose` into a run's folder: the run is not trained again for it, nor removed."""
    folder = {"outputs": [work.tree / "a"], "folder": work.tree}
    work.go(**folder)
    (work.tree / "theirs").touch()
    work.go(**folder)
    assert work.runs == 1 and (work.tree / "theirs").exists()
    work.go(**folder, settings="size=2")
    assert work.runs == 2 and not (work.tree / "theirs").exists()


def test_other_settings_are_other_work(work):
    work.go()
    work.go(settings="size=2")
    assert work.runs == 2
    work.go(settings="size=2")
    assert work.runs == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda work: work.source.write_text("other text"), "out.bin was made .* from other text"),
        (lambda work: work.file.write_text("cut"), "out.bin is not as .*work.json records it"),
        (lambda work: shutil.rmtree(work.tree), "out is not as .*work.json records it"),
        (lambda work: (work.stamps / "work.json").write_text("{"), "out.bin has no valid stamp .*work.json"),
    ],
)
def test_what_runs_have_read_is_kept_or_refused_but_never_replaced(work, change, said):
    work.go()
    assert work.go(is_read=True, inputs=[], settings="size=2").finished
    change(work)
    left = changes_below(work.source.parent)
    with pytest.raises(UserError, match=f"{said}.* runs have read it: .*, or give another demo_corpus.folder"):
        work.go(is_read=True)
    assert work.runs == 1 and changes_below(work.source.parent) == left


def test_what_a_sweep_has_prepared_is_read_for_all_that_share_it(work, monkeypatch):
    monkeypatch.setattr(steps, "data_steps", lambda *_, **__: [work.step])
    steps.prepare_demo_corpus(steps.DemoCorpus(folder=str(work.stamps.parent / "vocab")), is_read=False)
    assert work.go(inputs=[], settings="size=2").is_read and work.runs == 1  # `make demo`, with another Python


def test_what_runs_have_read_and_is_gone_or_was_never_whole_is_made_again(work):
    work.go()
    work.file.unlink()
    shutil.rmtree(work.tree)
    work.fail = True
    for found in ([False] * 2, [False] * 2 + [True]):
        with pytest.raises(KeyboardInterrupt):
            work.go(is_read=True)
        assert work.found == found


def test_an_input_touched_without_change_is_no_change(work):
    work.go()
    work.source.write_text("text")
    work.go()
    assert work.runs == 1


def test_interrupted_work_goes_on_with_what_it_left_and_its_time_adds_up(work):
    work.fail = True
    with pytest.raises(KeyboardInterrupt):
        work.go()
    work.fail = False
    stamp = work.go()
    assert work.found == [False, True]
    assert stamp.finished and stamp.seconds > 0


def test_interrupted_work_whose_input_changed_begins_anew(work):
    work.fail = True
    with pytest.raises(KeyboardInterrupt):
        work.go()
    work.fail = False
    work.source.write_text("other")
    work.go()
    assert work.found == [False, False]


def test_a_step_that_makes_nothing_is_an_error_and_not_stamped(work):
    with pytest.raises(UserError, match="did not make"):
        work.go(run=lambda: None)
    work.go()
    assert work.runs == 1
