#!/usr/bin/env python3
"""Serve an export with vLLM, ask it something with curl, and stop the server."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from server import ServerError, serve

ROOT = Path(__file__).resolve().parents[1]
EXPORT = ROOT / ".demo" / "hf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EXPORT, help="an export; default: the demo's")
    parser.add_argument("--prompt", default="def __init__(self")
    parser.add_argument("--max-tokens", type=int, default=40)
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        print(f"error: {args.model} holds no export: run `make demo` first, or give --model", file=sys.stderr)
        return 2
    if shutil.which("curl") is None:
        print("error: no curl on this machine (Debian, Ubuntu: apt-get install curl)", file=sys.stderr)
        return 2
    return serve_and_ask(args.model, args.prompt, args.max_tokens)


def serve_and_ask(model: Path, prompt: str, tokens: int) -> int:
    options = ("--enforce-eager", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 28))
    try:
        with TemporaryDirectory() as logs, serve(model, Path(logs), *options, show=True) as server:
            return ask(server.url, prompt, tokens)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def ask(server: str, prompt: str, tokens: int) -> int:
    body = json.dumps({"model": "plt", "prompt": prompt, "max_tokens": tokens, "temperature": 0})
    url = f"{server}/v1/completions"
    request = ["curl", "--silent", "--show-error", "--fail-with-body", url]
    request += ["--header", "Content-Type: application/json", "--data", body]
    print(f"\n$ curl {url} --header 'Content-Type: application/json' --data '{body}'", flush=True)
    done = subprocess.run(request, capture_output=True, text=True, check=False)
    print(done.stdout or done.stderr)
    if done.returncode:
        return 1
    print("\n" + prompt + json.loads(done.stdout)["choices"][0]["text"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
