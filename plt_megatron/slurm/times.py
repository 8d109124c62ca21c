"""Slurm's notation of time limits."""

from __future__ import annotations

import re

from plt_megatron.errors import UserError

_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",  # MM and MM:SS
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
_UNIT_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def parse_duration(text: str) -> int | None:
    """Seconds of an sbatch --time (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS); None: something else."""
    for form in _FORMS:
        match = re.fullmatch(form, text.strip(), re.ASCII)
        if match:
            return sum(_UNIT_SECONDS[unit] * int(count) for unit, count in match.groupdict().items() if count)
    return None


def time_limit(text: str, option: str = "--time") -> int:
    """`parse_duration` of a limit, above zero.

    Raises:
        UserError: it is none.
    """
    seconds = parse_duration(text)
    if not seconds:
        raise UserError(f"{option} {text}: expected a time as in 24:00:00, 90 (minutes) or 2-12:00:00 (days-hours)")
    return seconds


def time_option(seconds: float) -> str:
    """`90061.0` as `1-01:01:01`, `3661` as `01:01:01`: sbatch reads both back."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{days}-{clock}" if days else clock
