#!/usr/bin/env bash
# Makes, repairs or updates the project's virtual environment.
#
#   tools/make_venv.sh [VENV]        default VENV: .venv in this project
#   tools/make_venv.sh --find        only print the Python that would be used
#
# PYTHON=...    the Python to build it with (default: the first one found that works)
# PIP_ARGS=...  further arguments for pip, such as an index that has another build of torch
#
# If a Python here already has a CUDA build of torch and Transformer Engine (an NGC container), both are reused: the
# environment then sees the system's packages, and torch is pinned to the installed version.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '%s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

version_test='import sys; assert sys.version_info[:2] in ((3, 12), (3, 13))'
# A shim (pyenv, asdf) may exist without starting anything, and Debian packages ensurepip separately: run it to find out.
full_test="$version_test; import venv, ensurepip; print(sys.executable)"
gpu_stack_test='
from importlib.util import find_spec
assert find_spec("torch") and find_spec("transformer_engine")
import torch
assert torch.version.cuda
import transformer_engine.pytorch
print(torch.__version__)'

candidates() {
    if [ -n "${PYTHON:-}" ]; then
        printf '%s\n' "$PYTHON"
        return
    fi
    printf '%s\n' python3.13 python3.12 python3 python /usr/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12
    local path
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python; do
        [ -x "$path" ] && printf '%s\n' "$path"
    done
    return 0
}

# Prints the path of each candidate that works, once.
working_pythons() {
    local candidate
    candidates | while read -r candidate; do
        "$candidate" -c "$full_test" 2>/dev/null </dev/null || true
    done | awk '!seen[$0]++'
}

refuse() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv and ensurepip; give another one, or leave PYTHON unset"
    fi
    candidate=$(candidates | while read -r candidate; do
        if "$candidate" -c "$version_test" 2>/dev/null </dev/null; then printf '%s\n' "$candidate"; break; fi
    done)
    if [ -n "$candidate" ]; then
        fail "$candidate lacks venv or ensurepip; install them (Debian, Ubuntu: apt-get install python3-venv)"
    fi
    fail "no Python 3.12 or 3.13 found; install one (Debian 13, Ubuntu 24.04: apt-get install python3 python3-venv)" \
        "or say where it is: make venv PYTHON=/path/to/python"
}

# Sets `python`, and `system_torch` to the version of a torch that must be kept ('' if none).
choose_python() {
    local found candidate
    found=$(working_pythons)
    [ -n "$found" ] || refuse
    python=$(head -n 1 <<<"$found")
    system_torch=
    while read -r candidate; do
        # The output's last line: importing Transformer Engine may print.
        if system_torch=$("$candidate" -c "$gpu_stack_test" 2>/dev/null </dev/null | tail -n 1); then
            python=$candidate
            return
        fi
        system_torch=
    done <<<"$found"
}

# Runs "$@", which may be silent for minutes, and reports every ten seconds that it is still running.
with_heartbeat() {
    local venv=$1 log=$2 pid begun=$SECONDS next=10
    shift 2
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - begun >= next)); then
            say "  ... $((SECONDS - begun)) s, $(du -sh "$venv" 2>/dev/null | cut -f1) installed"
            next=$((SECONDS - begun + 10))
        fi
    done
    trap - INT TERM
    wait "$pid"
}

install() {
    local venv=$1 extra_args=() status=0
    if [ -n "$system_torch" ]; then
        printf 'torch==%s\n' "$system_torch" >"$venv/keep.txt"
        extra_args=(--constraint "$venv/keep.txt")
        unset PIP_CONSTRAINT # in NGC's images: all of their packages
        say "keeping this machine's torch $system_torch and Transformer Engine"
    elif "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        say "updating $venv"
    else
        say "installing into $venv: the download is about 3 GB (most of it torch's CUDA libraries), 6 GB on disk"
    fi
    # shellcheck disable=SC2206  # PIP_ARGS is a list of words
    extra_args+=(${PIP_ARGS:-})
    with_heartbeat "$venv" "$venv/pip.log" "$venv/bin/python" -m pip install --disable-pip-version-check \
        --progress-bar off "${extra_args[@]}" --editable "${project}[dev]" || status=$?
    [ "$status" -ne 0 ] || return 0
    # The environment is intact when pip gives up, but not when it is killed (128 and above).
    [ "$status" -ge 128 ] || rm -f "$venv/unfinished"
    tail -n 20 "$venv/pip.log" >&2
    fail "pip could not install the project (its last lines are above, all of them in $venv/pip.log);" \
        "fix that and run 'make venv' again"
}

# A second instance would take the unfinished environment for an abandoned one and remove it. The lock ends with us.
wait_for_others() {
    command -v flock >/dev/null || return 0 # not on macOS
    exec 9<"${BASH_SOURCE[0]}"
    flock --nonblock 9 && return 0
    say "another $(basename "${BASH_SOURCE[0]}") of this project is running; waiting for it"
    flock 9
}

main() {
    local python system_torch flags=()
    choose_python
    if [ "${1:-}" = --find ]; then
        say "$python"
        return
    fi
    local venv=${1:-$project/.venv}
    wait_for_others
    # `unfinished` exists from before the first file until after the last: an interrupted installation is rebuilt.
    if [ -e "$venv/unfinished" ] || ! "$venv/bin/python" -c "$version_test; import pip" 2>/dev/null; then
        if [ -e "$venv" ]; then
            [ -e "$venv/unfinished" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
                fail "$venv exists and is not a virtual environment; move it away"
            say "removing the incomplete $venv"
            rm -rf "$venv"
        fi
        mkdir -p "$venv"
        touch "$venv/unfinished"
        [ -z "$system_torch" ] || flags=(--system-site-packages)
        say "making $venv with $python ($("$python" -c 'import platform; print(platform.python_version())'))"
        "$python" -m venv "${flags[@]}" "$venv"
    fi
    touch "$venv/unfinished"
    install "$venv"
    "$venv/bin/python" -c 'import torch, megatron.core' 2>"$venv/import.log" || {
        tail -n 5 "$venv/import.log" >&2
        fail "the environment was installed, but torch or megatron-core does not import; run $venv/bin/python tools/doctor.py"
    }
    rm -f "$venv/unfinished" "$venv/import.log"
    touch "$venv/installed"
    say "ready: $venv, torch $("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')"
}

main "$@"
