"""Settings of jobs for tests."""

from __future__ import annotations

from typing import Any

from plt_megatron.launcher.job import JobSettings


def job_settings(**changes: Any) -> JobSettings:
    """Two nodes with two processes each, unless `changes` say otherwise."""
    size = {"nodes": 2, "processes_per_node": 2, "cpus_per_process": 1, "gpus_per_node": 0}
    return JobSettings(**({"job_name": "job", **size, "time_limit_seconds": 3600, "python": "python"} | changes))
