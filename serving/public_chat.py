#!/usr/bin/env python3
"""Chat with an export through vLLM's OpenAI API and compare the answer with transformers'.

    serving/.venv/bin/python serving/public_chat.py .public

The folder is the output of benchmarks/public_model.py: the export `two-trained`, and `scores.json` with transformers'
answer to its question. Exit status: 1 where the server answers otherwise, whole or streamed, or outside of
a JSON schema that it is given.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from openai import OpenAI
from server import ServerError, serve

OPTIONS = (
    # The export's own dtype, in which transformers answered: vLLM would take bf16, whose rounding decides near ties.
    *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(1 << 29)),
)
SCHEMA = {"enum": ["attention", "optimizer", "data"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    scores = folder / "scores.json"
    if not scores.is_file():
        print(f"error: {scores} not found: run benchmarks/public_model.py first", file=sys.stderr)
        return 2
    row = json.loads(scores.read_text(encoding="utf-8"))["two-trained"]
    try:
        with TemporaryDirectory() as logs, serve(folder / "two-trained", Path(logs), *OPTIONS, show=True) as server:
            missed = chat(OpenAI(base_url=f"{server.url}/v1", api_key="none"), row["question"], row["answer"])
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"missed: {line}" for line in missed) or "the server answers as transformers does")
    return int(bool(missed))


def chat(client: OpenAI, question: str, expected: str) -> list[str]:
    """Return one line for each difference from the expected answer; none if the server answers as expected."""
    asked = {"model": "plt", "messages": [{"role": "user", "content": question}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=40).choices[0].message.content
    parts = client.chat.completions.create(**asked, max_tokens=40, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    print(f"\nasked:    {question}\nanswered: {whole}")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    formed = client.chat.completions.create(**asked, max_tokens=64, response_format=form).choices[0].message.content
    print(f"as JSON:  {formed}")
    missed = []
    if whole != expected:
        missed.append(f"transformers answers {expected!r}")
    if streamed != whole:
        missed.append(f"streamed: {streamed!r}")
    if not fits(formed):
        missed.append(f"not an answer of the schema: {formed!r}")
    return missed


def fits(text: str | None) -> bool:
    """Return True if the text is JSON that the schema allows."""
    try:
        return json.loads(text or "") in SCHEMA["enum"]
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
