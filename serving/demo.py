#!/usr/bin/env python3
"""Serve an export with vLLM, ask it something with curl, and stop the server."""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORT = ROOT / ".demo" / "hf"
START_SECONDS = 300


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
    port = free_port()
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    server += ["--served-model-name", "plt", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    server += ["--max-num-seqs", "8", "--kv-cache-memory-bytes", str(1 << 28)]
    log = model / "server.log"
    print("$", " ".join(server), f"> {log}", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(server, stdout=output, stderr=subprocess.STDOUT)
    try:
        if not answers(process, port):
            print(f"error: the server did not start; the last lines of {log}:", file=sys.stderr)
            print("\n".join(log.read_text().splitlines()[-15:]), file=sys.stderr)
            return 1
        return ask(port, prompt, tokens)
    finally:
        process.terminate()
        process.wait()


def ask(port: int, prompt: str, tokens: int) -> int:
    body = json.dumps({"model": "plt", "prompt": prompt, "max_tokens": tokens, "temperature": 0})
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = ["curl", "--silent", "--show-error", "--fail-with-body", url]
    request += ["--header", "Content-Type: application/json", "--data", body]
    print(f"\n$ curl {url} --header 'Content-Type: application/json' --data '{body}'", flush=True)
    done = subprocess.run(request, capture_output=True, text=True, check=False)
    print(done.stdout or done.stderr)
    if done.returncode:
        return 1
    print("\n" + prompt + json.loads(done.stdout)["choices"][0]["text"])
    return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(process: subprocess.Popen, port: int) -> bool:
    """Whether the server comes up, before it ends or the time is over."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


if __name__ == "__main__":
    sys.exit(main())
