"""The HTTP server, whose engine runs in another process, with the openai client and with misbehaving clients."""

import asyncio
import json
import random
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import prompts
from server import ServerError, serve

OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "24"),
    *("--max-num-batched-tokens", "64", "--block-size", "32", "--num-gpu-blocks-override", "400"),
    *("--kv-cache-memory-bytes", str(1 << 28), "--disable-uvicorn-access-log"),
)


@pytest.fixture(scope="module")
def export(exports):
    return exports("plt3", tokenizer=True)


@pytest.fixture(scope="module")
def server(export, tmp_path_factory):
    with serve(export.folder, tmp_path_factory.mktemp("server"), *OPTIONS) as server:
        yield server


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def text_of(ids: list[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


def complete(client, ids: list[int], tokens: int = 12, **kwargs):
    extra = {"ignore_eos": True, "skip_special_tokens": False, **kwargs.pop("extra_body", {})}
    return client.completions.create(
        model="plt", prompt=ids, max_tokens=tokens, temperature=0, extra_body=extra, **kwargs
    )


def test_the_plugin_is_found_without_remote_code(server, client):
    assert [model.id for model in client.models.list().data] == ["plt"]
    assert "3 of 3 loops, parallel" in server.log.read_text()
    assert "Maximum concurrency for 256 tokens per request" in server.log.read_text()


def test_completions_and_logprobs(client, export):
    ids = prompts(8)[7]
    answer = complete(client, ids, logprobs=2).choices[0]
    expected = export.decode(ids, 12)
    assert answer.text.split() == ["</s>" if token == 0 else f"t{token}" for token in expected]
    assert len(answer.logprobs.token_logprobs) == 12 and max(answer.logprobs.token_logprobs) <= 0


def chat(client, **kwargs):
    return client.chat.completions.create(
        model="plt", messages=[{"role": "user", "content": text_of([5, 9, 11, 40])}], temperature=0, **kwargs
    )


def test_chat_and_stop_strings(client, export):
    """Chat completions use the template, which puts t2 before each message, and end at a stop string."""
    expected = [token for token in export.decode([2, 5, 9, 11, 40], 8) if token]
    assert ids_of(chat(client, max_tokens=8, extra_body={"ignore_eos": True}).choices[0].message.content) == expected
    stop = f"t{expected[2]}"
    cut = chat(client, max_tokens=8, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and stop not in (cut.message.content or "").split()


def test_structured_output(client):
    held = chat(client, max_tokens=4, extra_body={"structured_outputs": {"choice": ["t7", "t8"]}})
    assert held.choices[0].message.content.strip() in ("t7", "t8")


def test_200_concurrent_streams_of_which_some_vanish(server, export):
    """Each stream's tokens equal transformers', and the blocks of disconnected streams are freed."""
    from openai import AsyncOpenAI

    rng = random.Random(0)
    distinct = prompts(40, seed=5)
    wanted = [(distinct[index % 40], rng.randrange(1, 33)) for index in range(200)]
    vanishing = set(rng.sample(range(200), 30))

    async def stream(client, index: int):
        ids, tokens = wanted[index]
        found = []
        chunks = await client.completions.create(
            model="plt", prompt=ids, max_tokens=tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for chunk in chunks:
            found += chunk.choices[0].token_ids or []
            if index in vanishing:
                await chunks.close()
                return None
        return found

    async def all_of_them():
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(*(stream(client, index) for index in range(200)))

    for index, found in enumerate(asyncio.run(all_of_them())):
        ids, tokens = wanted[index]
        assert found is None or found == export.decode(ids, 32)[:tokens], index
    server.wait_until_idle()


def test_what_is_wrong_gets_the_right_status(server, client, export):
    import httpx
    import openai

    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="t1", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="256"):
        complete(client, [3] * 300)
    assert complete(client, [3] * 250, tokens=20).usage.completion_tokens == 6  # cut, as vLLM does
    with pytest.raises(openai.BadRequestError):
        complete(client, [10**6])
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="plt", prompt="t1", max_tokens=-3)
    for body in ("{not json", json.dumps(["a", "list"]), "", json.dumps({"model": "plt"})):
        answer = httpx.post(
            server.url + "/v1/completions", content=body, headers={"content-type": "application/json"}, timeout=60
        )
        assert 400 <= answer.status_code < 500, (body, answer.status_code)
    server.wait_until_idle()
    ids = prompts(3)[2]
    assert complete(client, ids).usage.completion_tokens == 12
    assert server.process.poll() is None


def test_a_wrong_option_ends_the_server_with_one_line_that_says_so(export, tmp_path):
    with pytest.raises(ServerError, match="loop_count must be from 1 to this model's 3, not 9"):
        with serve(export.folder, tmp_path, *OPTIONS, "--additional-config", '{"plt": {"loop_count": 9}}'):
            pass


def test_a_server_that_is_given_up_leaves_no_engine_behind(export, tmp_path, monkeypatch):
    started, Popen = [], subprocess.Popen

    def start(*arguments, **options):
        started.append(Popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(ZeroDivisionError):
        with serve(export.folder, tmp_path, *OPTIONS):
            started[0].kill()  # so that it cannot stop its engine
            raise ZeroDivisionError
    until = time.monotonic() + 30  # killed processes take a moment to go
    while left := _alive(started[0].pid):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def _alive(group):
    """Return the names of a process group's members, zombies excluded."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            name, fields = stat.read_text().rsplit(")", 1)
            state, _, own_group = fields.split()[:3]
            found += [name] if int(own_group) == group and state != "Z" else []
    return found
