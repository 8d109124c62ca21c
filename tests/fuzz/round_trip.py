"""A model that is exported, decoded and imported is the model that was trained.

With random weights: the export's logits are the training model's, in one pass, decoded loop-parallel and loop-serial
token by token; what is imported again has the same weights and the same logits, also when it gets new loops.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from plt_megatron.config.schema import RunConfig
from tests.fuzz import data, draw
from tests.fuzz.search import Kind

TOLERANCE = 1e-4  # of the largest logit
LENGTH, PREFILL = 26, 6
NEW_LOOPS = ({}, {"full_attention": "last_loop"}, {"loop_span": [0, 1]}, {"key_shift": "learned"})


class RoundTrip(Kind):
    """See the module's docstring."""

    name = "round_trip"
    often = 2

    def find_problems(self, config: RunConfig) -> Iterator[str]:
        if config.model.moe is not None and config.model.moe.expert_capacity_factor is not None:
            yield "model.moe.expert_capacity_factor drops tokens in training, an export none"

    def draw(self, seed: int, number: int) -> draw.Settings:
        title = f"{seed} {self.name}"
        return draw.draw(title, number, self.fixed, self.find_problems, sections=("model",), layout=False)

    def check(self, settings: draw.Settings) -> str | None:
        place = Path(tempfile.mkdtemp(dir=data.FOLDER))
        try:
            return self.run(there_and_back, 1, draw.load(settings), place.resolve(), timeout_s=300)
        finally:
            shutil.rmtree(place)


def there_and_back(config: RunConfig, place: Path) -> str | None:
    """Export, decode and import a model; say what is wrong, or None. Run by the pool."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.hf.tiny import decode
    from tests.unit.convert import convert_helpers as convert

    model = config.model
    vocab_size = model.vocab_size or convert.VOCAB
    weights = convert.random_weights(model, vocab_size)
    tokens = convert.make_tokens(2, LENGTH, vocab_size)
    expected = convert.megatron_logits(model, weights, tokens, vocab_size)
    convert.save_run(place / "run", model, weights, sequence_length=config.data.sequence_length)
    convert.quiet((place / "run", place / "export"))
    exported = AutoModelForCausalLM.from_pretrained(
        place / "export", trust_remote_code=True, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        found = {"export": exported(tokens, use_cache=False).logits}
    found["decoded, loops in parallel"] = decode(exported, tokens, PREFILL)
    found["decoded, loops in series"] = decode(exported, tokens, PREFILL, loop_mode="serial")
    result, again = convert.imported(place / "export", place / "imported")
    other = [name for name in weights if name not in again or not torch.equal(again[name], weights[name])]
    if other or again.keys() != weights.keys():
        return f"weights are others after the import: {other or again.keys() ^ weights.keys()}"
    found["imported"] = convert.megatron_logits(result.model, again, tokens, vocab_size)
    grown = [each for each in NEW_LOOPS if model.key_shift == "none" or "key_shift" not in each]
    for number, switches in enumerate(grown if model.loop_count == 1 else ()):
        options = {"loop_count": 2 + number % 2, "preset": "recommended", "switches": switches}
        result, more = convert.imported(place / "export", place / f"grown{number}", **options)
        found[f"imported with {options}"] = convert.megatron_logits(result.model, more, tokens, vocab_size)
    for name, logits in found.items():
        # Logits are all zero where later loops read nothing: model.embedding_scale=0 model.hidden_scale=0.
        off = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if not off <= TOLERANCE:
            return f"{name} is not the training model: its logits are off by {off:.1e}"
    return None
