"""Conversations: the chat template applied, a loss mask of the answers, and samples that follow it."""

from __future__ import annotations

import json
import random
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import (
    ASK,
    CHATML,
    MARKED_CHATML,
    bad_lines,
    build,
    chat_tokenizer,
    documents,
    make_text,
    reference,
    run_preprocess,
    train,
    write_source,
)

from plt_megatron.config.schema import DataConfig, DataSource, DataStage, FimConfig
from plt_megatron.data import indexed
from plt_megatron.data.encoders import ChatEncoder
from plt_megatron.data.formats import ReadOptions
from plt_megatron.data.mix import fingerprint
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.errors import UserError
from tests.files import update_json

# Drops what the assistant thought once there is a later message, as reasoning models' templates do.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('|')[-1] }}<|im_end|>\n{% endfor %}" + ASK
)
OPEN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPACED, SPACED_MARKED = (
    "{% for m in messages %}{{ m['role'] }}: " + begin + "{{ m['content'] }}<|im_end|>" + end + "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
    for begin, end in (
        ("", ""),
        (
            "{% if m['role'] == 'assistant' %}{% generation %}",
            "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}",
        ),
    )
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
READ = ReadOptions("messages", chat=True)
TWO = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "chatml")


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(count: int) -> list[dict[str, Any]]:
    rng = random.Random(3)
    found = []
    for number in range(count):
        messages = [say("system", "be brief")] if number % 3 == 0 else []
        for _ in range(rng.randrange(1, 4)):
            messages += [
                say("user", make_text(rng, rng.randrange(1, 12))),
                say("assistant", make_text(rng, 6) + " \U0001f600"),
            ]
        if number % 5 == 0:
            messages.append(say("user", "and then?"))  # unanswered
        found.append({"messages": messages, "tools": [{"name": "clock"}] if number % 4 == 0 else None})
    return found


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def encoder_of(folder: Path, *, append_eod: bool = True) -> ChatEncoder:
    return ChatEncoder(load_tokenizer(folder), append_eod=append_eod)


def lines_of(*conversations: list[dict[str, Any]]) -> list[str]:
    """Conversations without tools, as a file has them."""
    return [json.dumps({"messages": messages, "tools": None}) for messages in conversations]


def encode(folder: Path, conversation: dict[str, Any], *, append_eod: bool = True) -> tuple[list[int], list[int]]:
    encoded = encoder_of(folder, append_eod=append_eod)([json.dumps({"tools": None, **conversation})])
    assert not encoded.bad and encoded.lengths.tolist() == [len(encoded.flat)]
    return encoded.flat.tolist(), encoded.mask.tolist()


@pytest.mark.parametrize("base", [CHATML, MARKED_CHATML])
def test_tokens_do_not_depend_on_the_day(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates may ask for today's date; an export's chats have the real one."""
    from transformers.utils import chat_template_utils

    folder = chat_tokenizer(tmp_path / "dated", "Today: {{ strftime_now('%d %b %Y') }}\n" + base)
    found = []
    for day in (1, 2):
        clock = type("Clock", (), {"now": lambda day=day: datetime(2026, 12, day)})
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        found.append(encode(folder, conversations(1)[0]))
    assert found[0] == found[1] and sum(found[0][1])
    text = load_tokenizer(folder).decode(found[0][0])
    assert text.startswith("Today: 26 Jul 2024\n")
    with pytest.raises(UserError, match="today's date"):
        encoder_of(chat_tokenizer(tmp_path / "computed", "{{ strftime_now(x) }}"))


def test_tokens_and_mask_are_those_of_transformers(chatml: Path, tmp_path: Path) -> None:
    """Answers are found in a template without marks as transformers finds them in the same template with marks.

    It leaves out fields without a value, as a template that joins strings needs it.
    """
    from transformers import AutoTokenizer

    marked = AutoTokenizer.from_pretrained(chat_tokenizer(tmp_path / "marked", MARKED_CHATML))
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    without_values = [say("user", "two?"), called, say("user", "three?"), say("assistant", "3") | {"tool_calls": None}]
    for conversation in [*conversations(12), {"messages": without_values, "tools": None}]:
        theirs = marked.apply_chat_template(
            conversation["messages"], tools=conversation["tools"], return_dict=True, return_assistant_tokens_mask=True
        )
        expected = theirs["input_ids"], theirs["assistant_masks"]
        assert 0 < sum(expected[1]) < len(expected[1])
        assert encode(tmp_path / "marked", conversation) == expected
        assert encode(chatml, conversation) == expected


def test_a_trained_tokenizers_control_tokens_are_found_in_what_the_template_writes(
    corpus: Path, tmp_path: Path
) -> None:
    """Though its tokenizer_config.json makes them text in texts."""
    model = train(corpus, tmp_path / "t", control_symbols=("<|im_start|>", "<|im_end|>"))
    (tmp_path / "t/chat_template.jinja").write_text(CHATML)
    assert json.loads((tmp_path / "t/tokenizer_config.json").read_text())["split_special_tokens"] is True
    plain = reference(model)
    begin, end = plain.piece_to_id(["<|im_start|>", "<|im_end|>"])
    asked = [begin, *plain.encode("user\ntwo?"), end, begin, *plain.encode("assistant\n")]
    answer = [*plain.encode("2"), end, plain.eos_id()]
    found = encode(tmp_path / "t/tokenizer.json", {"messages": TWO})
    assert found == (asked + answer, [0] * len(asked) + [1] * len(answer))
    with pytest.raises(UserError, match=re.escape(f"{model} has no chat template; pass {tmp_path}/t/tokenizer.json")):
        encode(model, {"messages": []})
    encoder = encoder_of(tmp_path / "t/tokenizer.json")
    bad = encoder(lines_of([say("user", "a<|im_end|>b"), say("assistant", "2")])).bad
    assert list(bad) == [0] and "message 1 spells the special token <|im_end|>" in bad[0][1]
    update_json(tmp_path / "t/tokenizer_config.json", split_special_tokens=False)
    assert encoder_of(tmp_path / "t/tokenizer.json").fingerprint != encoder.fingerprint


def test_nothing_in_a_conversation_spells_a_special_token(chatml: Path, tmp_path: Path) -> None:
    """Neither one that tokenizer_config.json does not name, nor in a call, a role, a name or a tool."""
    from tokenizers import Tokenizer

    folder = tmp_path / "unnamed"
    shutil.copytree(chatml, folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(["<|start_header|>"])
    fast.save(str(folder / "tokenizer.json"))
    asked, answer = TWO
    call = {"function": {"name": "clock", "arguments": {"<|im_end|>": "x"}}}
    tools = [{"type": "function", "function": {"name": "clock", "description": "<|im_end|>"}}]
    forged = [
        ([say("user", "<|start_header|>"), answer], None),
        ([asked, answer | {"tool_calls": [call]}], None),
        ([say("user <|im_end|>", "two?"), answer], None),
        ([asked, answer], tools),
        ([asked, answer], None),
    ]
    lines = [json.dumps({"messages": messages, "tools": given}) for messages, given in forged]
    bad = encoder_of(folder / "tokenizer.json")(lines).bad
    assert list(bad) == [0, 1, 2, 3] and all("special token <|" in why for _, why in bad.values())


@pytest.mark.parametrize("marked", [False, True])
def test_a_token_that_begins_in_the_prompts_last_space_counts(marked: bool, tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "spaced", SPACED_MARKED if marked else SPACED)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    word = max((name for name in vocabulary if name.startswith("\u0120") and name[1:].isascii()), key=len)
    ids, mask = encode(folder, {"messages": [say("user", "a"), say("assistant", word[1:])]})
    assert [number for number, counted in zip(ids, mask, strict=True) if counted] == [vocabulary[word], 2]


def test_tokens_that_the_tokenizers_file_lacks_are_named(tmp_path: Path) -> None:
    """transformers numbers them from the vocabulary's size on."""
    folder = chat_tokenizer(tmp_path / "more", CHATML.replace("<|im_start|>", "<|turn|>"))
    update_json(folder / "tokenizer_config.json", additional_special_tokens=["<|turn|>", "<|unused|>"])
    with pytest.raises(UserError, match=r"tokenizer_config.json names: <\|turn\|>$"):
        encode(folder, {"messages": TWO})


@pytest.mark.parametrize("last", ["user", "assistant"])
def test_an_answer_that_the_template_does_not_end_is_ended(last: str, tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "open", OPEN)
    messages = [*TWO, say("user", "three?")] if last == "user" else TWO
    ids, mask = encode(folder, {"messages": messages})
    assert ids[-1] == load_tokenizer(folder).eod and mask[-1] == (last == "assistant")
    assert encode(folder, {"messages": messages}, append_eod=False) == (ids[:-1], mask[:-1])


NESTED = "[" * 3000 + "]" * 3000
BAD = {
    "no list": ({"messages": "hi"}, "'messages'"),
    "no messages": ({"messages": []}, "'messages'"),
    "no role": ({"messages": [{"content": "hi"}]}, "message 1"),
    "no content": ({"messages": [say("user", "a"), {"role": "assistant"}]}, "message 2"),
    "no answer": ({"messages": [say("user", "a")]}, "assistant"),
    "no messages field": ({"text": "a"}, "'messages'"),
    "refused by the template": ({"messages": [say("assistant", "a")]}, "roles must alternate"),
    "tools nested too deeply": (f'{{"messages": {json.dumps(TWO)}, "tools": [{{"name": {NESTED}}}]}}', "recursion"),
    "lone surrogate": ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate"),
}


def test_bad_conversations_are_bad_lines(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "strict", STRICT)
    lines = [line for bad, _ in BAD.values() for line in (bad, {"messages": TWO})]
    made = run_preprocess([write_lines(tmp_path / "chat.jsonl", lines)], tmp_path / "out", folder, read=READ)
    assert made["documents"] == len(BAD) and sum(made["bad_lines"].values()) == len(BAD)
    reasons = {bad["line"]: bad["reason"] for bad in bad_lines(tmp_path / "out")}
    for number, (_, named) in enumerate(BAD.values()):
        assert named in reasons[2 * number + 1]


def test_a_conversation_may_begin_with_an_answer(chatml: Path) -> None:
    greeting = say("assistant", "hello")
    decoded, first = (
        load_tokenizer(chatml).decode([token for token, counted in zip(*found, strict=True) if counted])
        for found in (encode(chatml, {"messages": each}) for each in ([greeting, *TWO], [say("user", "hi"), greeting]))
    )
    assert decoded.startswith(first) and "hello" in first and "user" not in decoded and "2" in decoded


BREAKS = ["1 / 0", "{}.popitem()", "'{x}'.format()", "'%s'.nothing.at.all", "10.0 ** 999"]


@pytest.mark.parametrize(("fails", "named"), [*((each, "") for each in BREAKS), ("raise_exception('')", "rejects it")])
def test_a_conversation_that_breaks_the_template_is_a_bad_line(fails: str, named: str, tmp_path: Path) -> None:
    """Or one that it refuses without a word."""
    folder = chat_tokenizer(tmp_path / "a", "{{ " + fails + " }}" + CHATML)
    bad = encoder_of(folder)(lines_of([say("assistant", "a")])).bad
    assert list(bad) == [0] and named in bad[0][1]


@pytest.mark.parametrize("name", ["Own", "utils"])  # the second is a module of transformers
def test_a_tokenizers_own_code_is_not_run(name: str, tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "a")
    own = {"AutoTokenizer": ["own.Own", "own.Own"]}
    update_json(folder / "tokenizer_config.json", tokenizer_class=name, auto_map=own)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    encoder_of(folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_transformers_cannot_read_is_a_line(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "damaged")
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(str(folder))) as error:
        encoder_of(folder)
    assert "\n" not in str(error.value)


def test_a_conversation_is_encoded_as_texts_are(tmp_path: Path) -> None:
    """And not as the class named beside tokenizer.json would; what it encoded once is other data."""
    folder = chat_tokenizer(tmp_path / "a", "{{ messages[0]['content'] }}")
    described = json.loads((folder / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, described["pre_tokenizer"]]}
    described["model"]["merges"].append(["1", "2"])
    described["model"]["vocab"]["12"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(described))
    prints = set()
    for kind in ("PreTrainedTokenizerFast", "GPT2Tokenizer"):
        update_json(folder / "tokenizer_config.json", tokenizer_class=kind)
        encoder = encoder_of(folder, append_eod=False)
        flat = encoder(lines_of([say("assistant", "in 12")])).flat
        assert flat.tolist() == load_tokenizer(folder).encode("in 12")
        prints.add(encoder.fingerprint)
    assert len(prints) == 2


def test_a_template_for_tools_is_one_of_several(chatml: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": OPEN}, {"name": "tool_use", "template": MARKED_CHATML}]
    several = chat_tokenizer(tmp_path / "several", templates)
    plain = chat_tokenizer(tmp_path / "plain", OPEN)
    for conversation in conversations(8):
        assert encode(several, conversation) == encode(chatml if conversation["tools"] else plain, conversation)


def test_a_template_that_forgets_is_told_to_mark_its_answers(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "forgetful", FORGETFUL)
    messages = [say("user", "a"), say("assistant", "hm|b"), say("user", "c"), say("assistant", "hm|d")]
    found = encoder_of(folder)(lines_of(messages[:2], messages))
    assert list(found.bad) == [1] and "{% generation %}" in found.bad[1][1] and len(found.lengths) == 1


def test_workers_shards_and_another_run_make_the_same_mask(chatml: Path, tmp_path: Path, capsys: Any) -> None:
    corpus = write_lines(tmp_path / "chat.jsonl", conversations(60))
    made = run_preprocess([corpus], tmp_path / "one", chatml, read=READ)
    run_preprocess([corpus], tmp_path / "many", chatml, read=READ, workers=2, shard_bytes=4000)
    for suffix in (".bin", ".idx", indexed.MASK_SUFFIX):
        assert Path(f"{tmp_path}/one{suffix}").read_bytes() == Path(f"{tmp_path}/many{suffix}").read_bytes()
    mask = indexed.open_mask(tmp_path / "one", made["tokens"])
    assert made["loss_mask_tokens"] == int(mask.sum()) and 0 < made["loss_mask_tokens"] < made["tokens"]
    expected = [encode(chatml, conversation) for conversation in conversations(60)]
    assert documents(tmp_path / "one") == [ids for ids, _ in expected]
    assert mask.tolist() == [value for _, values in expected for value in values]
    assert f"{made['loss_mask_tokens']:,} tokens count" in capsys.readouterr().err
    run_preprocess([corpus], tmp_path / "one", chatml, read=READ)
    assert "already done" in capsys.readouterr().err
    Path(f"{tmp_path}/one{indexed.MASK_SUFFIX}").unlink()
    with pytest.raises(UserError, match="--overwrite"):
        run_preprocess([corpus], tmp_path / "one", chatml, read=READ)
    plain = write_lines(tmp_path / "plain.jsonl", [{"text": "hello"}])
    run_preprocess([plain], tmp_path / "many", chatml, overwrite=True)
    assert not indexed.has_mask(tmp_path / "many")


@pytest.mark.parametrize("changed", [{"chat_template": OPEN}, {"bos_token": "<|im_start|>"}])
def test_another_template_is_another_output(chatml: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    """So are other special tokens, which a template may print."""
    corpus = write_lines(tmp_path / "chat.jsonl", conversations(4))
    folder = tmp_path / "copy"
    shutil.copytree(chatml, folder)
    run_preprocess([corpus], tmp_path / "out", folder, read=READ)
    update_json(folder / "tokenizer_config.json", **changed)
    with pytest.raises(UserError, match="--overwrite"):
        run_preprocess([corpus], tmp_path / "out", folder, read=READ)


def test_what_has_no_template_is_refused(bpe_model: Path, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "chat.jsonl", conversations(2))
    text = write_lines(tmp_path / "chat.txt", ["hello"])
    bare = chat_tokenizer(tmp_path / "bare", None)
    cases = ((corpus, bpe_model, str(bpe_model)), (corpus, bare, "chat_template"), (text, bare, "chat.txt"))
    for source, model, named in cases:
        with pytest.raises(UserError, match=re.escape(named)):
            run_preprocess([source], tmp_path / "out", model, read=READ)
    assert not list(tmp_path.glob("out*"))


# ---------------------------------------------------------------- samples


def masked_source(prefix: Path, seed: int, odd: bool = True) -> DataSource:
    """Documents of random tokens, of which the odd (even) ones count."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, 80)
    tokens = rng.integers(0, 400, int(lengths.sum()))
    write_source(prefix, tokens, lengths)
    (tokens % 2 == odd).astype(np.uint8).tofile(indexed.mask_path(prefix))
    return DataSource(str(prefix))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kind", ["alone", "mix", "stages"])
def test_samples_count_what_the_mask_says(kind: str, reset: bool, tmp_path: Path) -> None:
    one, two = masked_source(tmp_path / "one", 1), masked_source(tmp_path / "two", 2, odd=False)
    indexed.mask_path(two.path).unlink()  # all of it counts
    sources = [one] if kind == "alone" else [one, two]
    stages = (
        [DataStage(until=16 * 40, sources=[one]), DataStage(until=16 * 80, sources=[two])] if kind == "stages" else []
    )
    data = DataConfig(
        sources=sources, sequence_length=16, split="90,10,0", stages=stages, reset_at_document_boundaries=reset
    )
    built = build(data, (80, 8, 0), tmp_path / "cache", seed=4)
    seen = set()
    for samples in (built.train, built.validation):
        for index in range(len(samples)):
            item, which = samples[index], samples.parts(index)[0]
            expected = item["labels"] % 2 == 1 if which == 0 else item["labels"] >= 0
            if reset:
                expected[:-1] &= ~item["document_starts"][1:]
                expected[-1], item["loss_mask"][-1] = True, 1  # whose label may begin a document
            assert item["loss_mask"].tolist() == expected.float().tolist()
            seen.add(which)
    assert len(seen) == len(sources)


def test_a_token_that_ends_messages_does_not_end_conversations(chatml: Path, tmp_path: Path) -> None:
    """As ChatML's, which a newline follows: `data.eod_mask_loss` leaves out a conversation's first token alone."""
    tokenizer = load_tokenizer(chatml)
    prefix = write_source(tmp_path / "one", np.tile([9, tokenizer.eod, 9, tokenizer.eod, 8], 50), np.full(50, 5))
    np.ones(250, np.uint8).tofile(indexed.mask_path(prefix))
    data = DataConfig(sources=[DataSource(prefix)], sequence_length=16, split="100,0,0", eod_mask_loss=True)
    item = build(data, (8, 0, 0), tmp_path / "cache", tokenizer).train[0]
    assert item["loss_mask"].tolist() == (item["tokens"] != 8).float().tolist()


def test_a_mask_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    source = masked_source(tmp_path / "one", 1)
    data = DataConfig(sources=[source], sequence_length=16, split="100,0,0")
    path, manifest = indexed.mask_path(source.path), Path(f"{source.path}.manifest.json")
    whole, before = path.read_bytes(), fingerprint(data, None)["sha256"]
    for content, named in ((whole[:-1], "bytes"), (bytes(len(whole)), "largest byte is 0"), (b"\x02" + whole[1:], "2")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*{named}"):
            build(data, (80, 0, 0), tmp_path / "cache", seed=4)
    path.unlink()
    assert fingerprint(data, None)["sha256"] != before
    manifest.write_text(json.dumps({"loss_mask_tokens": 5}))
    with pytest.raises(UserError, match=re.escape(str(path))):
        build(data, (80, 0, 0), tmp_path / "cache", seed=4)
    manifest.unlink()
    assert build(data, (80, 0, 0), tmp_path / "cache", seed=4).train[0]["loss_mask"].sum() == 16


def test_documents_with_a_mask_are_not_rearranged(chatml: Path, tmp_path: Path) -> None:
    source = masked_source(tmp_path / "one", 1)
    tokenizer = load_tokenizer(chatml)
    fim = FimConfig(rate=0.5, tokens=["<|endoftext|>", "<|im_start|>", "0"])
    data = DataConfig(sources=[source], sequence_length=16, split="100,0,0", fim=fim)
    with pytest.raises(UserError, match="fim.*loss_mask"):
        build(data, (8, 0, 0), tmp_path / "cache", tokenizer)
