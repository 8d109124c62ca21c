"""The coordinator on the first node, which decides for all launchers: a state machine without sockets or processes.

    joining -> preflight -> training -> settling -> stopping -> (preflight ...) -> over

Nodes report events and receive commands. A silent or lost node, a failed process and a request to stop each end the
attempt on every node; then a new one starts in the same allocation, or the job ends with a status that says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from plt_megatron.launcher import decisions, preflight
from plt_megatron.launcher.decisions import is_explained, outcome_of
from plt_megatron.launcher.job import Allocation, JobSettings
from plt_megatron.launcher.records import Exit, Outcome, Records
from plt_megatron.run_folder import attempts
from plt_megatron.run_folder.attempts import PEACEFUL, ExitStatus
from plt_megatron.run_folder.text import plural

JOIN_SECONDS = 300.0  # for all nodes to join: containers may start slowly
PROBE_SECONDS = 180.0  # for the check of devices and links, including imports from a busy file system
SILENCE_SECONDS = 900.0  # a launcher that is silent for so long is gone; a node, once its kernel does not answer
_SUSPICIOUS_SECONDS = 8.0  # the same, before and again after Slurm asks the job to stop
SETTLE_SECONDS = 3.0  # after a failure, for other ranks to report a more likely cause
# The same while no rank has reported a cause. Rank 0 reports a hung rank, and its watchdog ends it last: up to four of
# its intervals of 5 s later on a machine that is not overloaded.
UNEXPLAINED_SECONDS = 60.0
STOP_SECONDS = 30.0  # for the nodes to end their processes
_LEAVE_SECONDS = 30.0  # for what follows: records, and the requeue
_STRAGGLER_SECONDS = 1800.0  # for the other processes, after the first has exited cleanly

_NEXT_TRY_STATUS = {
    attempts.FINISHED: ExitStatus.FINISHED,
    attempts.PREEMPTED: ExitStatus.PREEMPTED,
    attempts.FAILED: ExitStatus.FAILED,
    attempts.NODE_FAILED: ExitStatus.NODE_LOST,
}


class Coordinator:
    """Runs the job of one allocation: `send` takes a node and a message to it, `say` a line for the log."""

    def __init__(
        self,
        allocation: Allocation,
        settings: JobSettings,
        run_records: Records,
        send: Callable[[str, dict[str, Any]], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.status: int | None = None  # the exit status of all launchers once the job is over
        self._allocation, self._settings, self._records = allocation, settings, run_records
        self._send, self._say, self._clock = send, say, clock
        self._facts: dict[str, preflight.Facts] = {}
        self._gone: set[str] = set()
        self._heard = {node: clock() for node in allocation.nodes}
        self._preempted = False
        self._asked = 0.0  # when Slurm asked to stop, while training
        self._must_end = float("inf")  # Slurm's limit, unlike the silence of nodes, passes while this process is stuck
        self._restarts = 0
        self._state, self._deadline = "", 0.0
        self._node_of: dict[int, str] = {}  # of each process of the preflight check
        self._results: dict[int, preflight.Facts] = {}
        self._exits: list[Exit] = []
        self._outcome: Outcome | None = None
        self._waiting_for: set[str] = set()
        self.attempt = run_records.begin()
        self._enter("joining", JOIN_SECONDS)

    # Events.

    def handle(self, node: str, message: dict[str, Any]) -> None:
        """Handle a message from a node."""
        self._heard[node] = self._clock()
        handler = {
            "hello": self._on_hello,
            "probe": self._on_probe,
            "exited": self._on_exited,
            "stopped": self._on_stopped,
        }.get(message["type"])
        if handler is not None and self.status is None:
            handler(node, message)

    def preempt(self) -> None:
        """Have the processes save and exit, since Slurm asks the job to stop."""
        if self._preempted or self.status is not None:
            return
        self._preempted = True
        self._say("asked to stop: saving")
        if self._state == "training":
            self._asked = self._clock()  # silent nodes' messages may be waiting to be read: `tick` judges
            # A job that Slurm ends at its limit is not requeued: end before, whatever hangs. An end that has passed was
            # put off since the job began.
            left = self._allocation.end_time - time.time()
            if left > 0:
                self._must_end = time.monotonic() + max(left / 2, left - STOP_SECONDS - _LEAVE_SECONDS)
            self._send_all({"type": "preempt"})
        elif self._state in ("joining", "preflight"):
            self._stop(Outcome(attempts.PREEMPTED, "asked to stop before training began"))

    def lost(self, node: str, why: str) -> None:
        """End the attempt, since a node's launcher is gone."""
        if node in self._gone or self.status is not None:
            return
        self._gone.add(node)
        if self._state == "stopping":
            self._on_stopped(node, {})
        else:
            self._stop(Outcome(attempts.NODE_FAILED, f"{node} is lost: {why}"))

    def tick(self) -> None:
        """Check the time-outs; to be called often."""
        if self.status is not None:
            return
        now = self._clock()
        for node, heard in list(self._heard.items()):
            was_silent = self._state == "training" and self._asked - heard > _SUSPICIOUS_SECONDS
            gone = now - heard > SILENCE_SECONDS or (was_silent and now - self._asked > _SUSPICIOUS_SECONDS)
            if gone and self._state != "joining":
                self.lost(node, f"its launcher has been silent for {now - heard:.0f} s")
        out_of_time = self._state == "training" and time.monotonic() >= self._must_end
        if self.status is None and (now >= self._deadline or out_of_time):
            self._on_deadline()

    # Joining and preflight.

    def _on_hello(self, node: str, message: dict[str, Any]) -> None:
        if self._state != "joining" or node in self._facts:
            return
        self._facts[node] = message["facts"]
        if len(self._facts) == len(self._allocation.nodes):
            self._check_facts()

    def _check_facts(self) -> None:
        facts = {node: self._facts[node] for node in self._allocation.nodes}
        first = facts[self._allocation.first_node]
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        found = f"{plural(len(facts), 'node')}, {plural(len(first['devices']), 'GPU')} on the first"
        self._say(f"preflight: {found}, {versions}")
        if len(facts) > 1:
            skews = {node: abs(fact.get("skew", 0.0)) for node, fact in facts.items()}
            worst = max(skews, key=lambda node: skews[node])
            self._say(f"preflight: clocks within {skews[worst]:.3f} s of the first node's ({worst} the furthest)")
        shared = preflight.shared_problem(first)
        if shared is not None:
            self._stop(Outcome(attempts.FAILED, f"preflight: {shared}", retry=False))
            return
        bad = preflight.judge(facts, self._settings.gpus_per_node)
        if bad:
            self._stop(self._bad_nodes(bad))
        else:
            self._preflight()

    def _bad_nodes(self, bad: dict[str, str]) -> Outcome:
        reason = "preflight: " + "; ".join(f"{node}: {why}" for node, why in bad.items())
        if len(bad) == len(self._allocation.nodes) and len(bad) > 1:
            # All nodes fail: other nodes would probably fail too.
            return Outcome(attempts.FAILED, reason, retry=False)
        return Outcome(attempts.NODE_FAILED, reason, bad_nodes=bad)

    def _preflight(self) -> None:
        if self._preempted:
            self._stop(Outcome(attempts.PREEMPTED, "asked to stop before training began"))
            return
        per_node = self._settings.probes_per_node
        self._node_of = dict(enumerate(node for node in self._allocation.nodes for _ in range(per_node)))
        self._results = {}
        if len(self._node_of) == 1:
            self._train()  # a single process has no links to check
            return
        self._enter("preflight", PROBE_SECONDS)
        self._start("probe")

    def _on_probe(self, node: str, message: dict[str, Any]) -> None:
        if self._state == "preflight" and message.get("attempt") == self.attempt:
            self._results[int(message["result"]["rank"])] = message["result"]

    def _probe_failed(self, what: str) -> None:
        bad = preflight.blame(self._results, self._node_of)
        nobody = Outcome(attempts.FAILED, f"preflight: {what}; no single node is at fault")
        self._stop(self._bad_nodes(bad) if bad else nobody)

    def _probe_passed(self) -> None:
        per_node: dict[str, dict[str, str]] = {}
        for rank, result in sorted(self._results.items()):
            per_node.setdefault(self._node_of[rank], result["versions"])
        bad = dict(preflight.odd_versions(per_node))
        if bad:
            self._stop(self._bad_nodes(bad))
            return
        for line in preflight.describe_links(self._results, self._node_of):
            self._say(f"preflight: {line}")
        self._train()

    # Training.

    def _train(self) -> None:
        settings = self._settings
        self._say(f"training: {plural(settings.nodes, 'node')} x {plural(settings.processes_per_node, 'process')}")
        self._enter("training", float("inf"))
        self._start("train")

    def _start(self, task: str) -> None:
        self._exits = []
        port = self._allocation.rendezvous_port(self.attempt if task == "train" else self.attempt + 1)
        self._send_all({"type": "start", "task": task, "attempt": self.attempt, "port": port})

    def _on_exited(self, node: str, message: dict[str, Any]) -> None:
        if message["attempt"] != self.attempt:
            return
        end = Exit(int(message["rank"]), node, int(message["code"]), message["lines"])
        if message["task"] == "probe" and self._state == "preflight":
            self._probe_ended(end)
        elif message["task"] == "train" and self._state in ("training", "settling"):
            self._rank_ended(end)

    def _probe_ended(self, end: Exit) -> None:
        self._exits.append(end)
        if end.code:
            self._probe_failed((end.lines or ["a process of the check failed"])[-1])
        elif len(self._exits) == len(self._node_of):
            self._probe_passed()

    def _rank_ended(self, end: Exit) -> None:
        self._exits.append(end)
        if len(self._exits) == self._settings.world_size:
            self._stop(outcome_of(self._exits, self._preempted))
        elif self._state == "settling" or end.code not in PEACEFUL:
            if self._state == "training":
                self._enter("settling", UNEXPLAINED_SECONDS)
            if is_explained(end):
                self._deadline = min(self._deadline, self._clock() + SETTLE_SECONDS)
        elif self._deadline == self._must_end == float("inf"):
            self._deadline = self._clock() + _STRAGGLER_SECONDS

    # The end of an attempt.

    def _stop(self, outcome: Outcome) -> None:
        """End the attempt on all nodes."""
        self._enter("stopping", STOP_SECONDS)
        self._outcome = outcome
        self._waiting_for = set(self._facts) - self._gone  # only nodes that have joined
        self._send_all({"type": "stop"})
        if not self._waiting_for:
            self._conclude(outcome)

    def _on_stopped(self, node: str, message: dict[str, Any]) -> None:
        if self._state == "stopping" and self._outcome is not None:
            self._waiting_for.discard(node)
            if not self._waiting_for:
                self._conclude(self._outcome)

    def _on_deadline(self) -> None:
        if self._state == "joining":
            missing = [node for node in self._allocation.nodes if node not in self._facts]
            why = f"its launcher did not report within {JOIN_SECONDS:.0f} s"
            self._stop(self._bad_nodes(dict.fromkeys(missing, why)))
        elif self._state == "preflight":
            self._probe_failed(f"the check of devices and links took longer than {PROBE_SECONDS:.0f} s")
        elif self._state == "training":
            missing_ranks = sorted(set(range(self._settings.world_size)) - {end.rank for end in self._exits})
            late = f"before the time limit, {self._clock() - self._asked:.0f} s after they were asked to save"
            when = late if self._preempted else "with the others"
            self._stop(Outcome(attempts.FAILED, f"ranks {missing_ranks} did not end {when}"))
        elif self._state == "settling":
            self._stop(outcome_of(self._exits, self._preempted))
        elif self._outcome is not None:
            self._say(f"{', '.join(sorted(self._waiting_for))}: processes could not be ended in {STOP_SECONDS:.0f} s")
            self._conclude(self._outcome)

    def _conclude(self, outcome: Outcome) -> None:
        self._records.end(self.attempt, outcome)
        self._say(f"{outcome.status}: {outcome.reason}")
        if self._may_restart(outcome):
            self._restarts += 1
            self.attempt = self._records.begin()
            self._say(f"restarting in this allocation, restart {self._restarts} of {self._settings.max_restarts}")
            self._preflight()
            return
        self._state, self.status = "over", self._status_of(outcome)
        self._send_all({"type": "quit", "status": self.status, "reason": outcome.reason})

    def _may_restart(self, outcome: Outcome) -> bool:
        # Where processes could not be ended, they still hold their GPUs.
        if outcome.status != attempts.FAILED or self._preempted or self._gone or self._waiting_for:
            return False
        decision = decisions.decide(self._records.events(), self._settings)
        return decision.action == decisions.AGAIN and self._restarts < self._settings.max_restarts

    def _status_of(self, outcome: Outcome) -> int:
        if outcome.bad_nodes:
            return ExitStatus.BAD_NODE
        if outcome.status == attempts.FAILED and not outcome.retry:
            return ExitStatus.USER_ERROR
        return _NEXT_TRY_STATUS[outcome.status]

    # Helpers.

    def _enter(self, state: str, seconds: float) -> None:
        self._state, self._deadline = state, self._clock() + seconds

    def _send_all(self, message: dict[str, Any]) -> None:
        for node in self._allocation.nodes:
            if node not in self._gone:
                self._send(node, message)
