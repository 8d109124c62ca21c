#!/usr/bin/env bash
# Runs while an image is built: installs the project on the base's torch and Transformer Engine, which stay as they are.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

keep=$(mktemp)
trap 'rm -f "$keep"' EXIT
python3 - >"$keep" <<'END'
from importlib.metadata import version

for name in ("torch", "transformer-engine"):
    print(f"{name}=={version(name)}")
END
unset PIP_CONSTRAINT # in NGC's images: all of their packages
python3 -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore --constraint "$keep" \
    ".[hf,data,report,eval,muon,track,upload]"
python3 -c 'import megatron.core, plt_megatron, torch; assert torch.version.cuda, "torch is not the base image'\''s"'
