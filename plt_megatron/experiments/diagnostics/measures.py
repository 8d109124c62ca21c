"""The diagnostics as functions of the tensors of one sequence.

T tokens, d the hidden size, H heads, D the head dimension, V the vocabulary, L the loop count. h(r), r = 0 .. L, are
the states [T, d] after each loop. A value that is not defined is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of the largest temporary tensor: logits of a part of the tokens, attention of a part of the queries.
BLOCK_ELEMENTS = 1 << 23


def mean_norm(vectors: Tensor) -> float:
    """Return the mean L2 norm of the rows of [T, d]; NaN without rows."""
    return float(vectors.double().norm(dim=-1).mean())


def relative_step(state: Tensor, previous: Tensor) -> float:
    """Return the mean over tokens of ||h(r) - h(r-1)|| / ||h(r-1)||, without tokens whose h(r-1) is zero."""
    size = previous.double().norm(dim=-1)
    step = (state.double() - previous.double()).norm(dim=-1)
    return float((step / size)[size > 0].mean())


def update_cosine(update: Tensor, previous_update: Tensor) -> float:
    """Return the mean over tokens of the cosine of two updates [T, d], without tokens for which either is zero."""
    first, second = update.double(), previous_update.double()
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    return float(((first * second).sum(-1) / norms)[norms > 0].mean())


def offset_cost(state: Tensor, starts: Tensor | None = None) -> float:
    """Return the mean of ||h_i - h_(i-1)|| over tokens that have a token before them.

    Args:
        starts: bool [T], first tokens of documents, which receive nothing from the token before.
    """
    differences = state[1:].double() - state[:-1].double()
    return mean_norm(differences if starts is None else differences[~starts[1:]])


def effective_rank(states: Tensor) -> float:
    """Return exp(entropy of normalized singular values) of [T, d] with rows divided by their RMS; 1 .. min(T, d)."""
    rows = states.double()
    rms = rows.pow(2).mean(-1, keepdim=True).sqrt()
    rows = torch.where(rms > 0, rows / rms, rows)
    gram = rows.T @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.T
    return _rank_of_gram(gram)


def _rank_of_gram(gram: Tensor) -> float:
    """Return the effective rank of a matrix by its Gram matrix, whose eigenvalues are the squared singular values."""
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if not total > 0:
        return math.nan
    return math.exp(float(torch.special.entr(singular / total).sum()))


def head_diversity(outputs: Tensor) -> tuple[float, float]:
    """Return (effective rank, mean pairwise cosine) of head outputs [T, H, D], scaled to length 1 for each token.

    The rank, from 1 (all heads agree) to H, is that of the matrix whose row h is head h over all tokens; the products
    of its rows are the cosines averaged over tokens. The cosine is NaN for a single head.
    """
    tokens, heads, _ = outputs.shape
    unit = F.normalize(outputs.double(), dim=-1).transpose(0, 1).flatten(1)
    cosines = unit @ unit.T / tokens
    pairs = heads * (heads - 1)
    cosine = float(cosines.sum() - cosines.trace()) / pairs if pairs else math.nan
    return _rank_of_gram(cosines), cosine


def copy_distances(tokens: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return how far back each label could be copied from, by an induction head that looks up its last two tokens.

    Args:
        tokens: int64 [T + 1], the last one only as a label.
        starts: bool [T + 1], first tokens of documents kept apart; None: one document.

    Returns:
        int64 [T]: for the token after place t, the distance from t to the last earlier place with the same two tokens
        (t - 1, t), if the same token followed there; else 0.
    """
    row, last = tokens.tolist(), dict[tuple[int, int, int], int]()
    distances = [0] * (len(row) - 1)
    documents = (torch.zeros_like(tokens) if starts is None else starts.long().cumsum(0)).tolist()
    for place in range(1, len(row) - 1):
        context = (documents[place], row[place - 1], row[place])
        before = last.get(context)
        if before is not None and row[before + 1] == row[place + 1]:
            distances[place] = place - before
        last[context] = place
    return torch.tensor(distances, device=tokens.device)


def lens_statistics(
    states: Sequence[Tensor],
    labels: Tensor,
    counted: Tensor,
    head: Callable[[Tensor], Tensor],
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Apply the logit lens: measure the predictions of a model that stops after each loop.

    Args:
        states: h(0) .. h(L), [T, d]; h(0) is not used.
        labels: int64 [T], the next tokens.
        counted: bool [T], the tokens that count.
        head: maps states to logits [.., V].
        groups: bool [T] by name, tokens to report a separate mean loss for.

    Returns:
        Arrays [L + 1] by name, means over the tokens that count: `lens_loss` (nats), `lens_rank` (of the label, 1 is
        best), `lens_entropy` (nats), `lens_kl` = KL(p(r) || p(r-1)) (nats, r >= 2), and `peak_loop`, the share of
        tokens whose largest KL is at r (r >= 2); under each group's name, the mean loss of its tokens that count.
    """
    loops, groups = len(states) - 1, groups or {}
    names = ("lens_loss", "lens_rank", "lens_entropy", "lens_kl", "peak_loop", *groups)
    sums = {name: np.zeros(loops + 1) for name in names}
    places = counted.nonzero().squeeze(-1)
    if not len(places):
        return {name: np.full(loops + 1, math.nan) for name in sums}
    vocabulary = head(states[-1][:1]).shape[-1]
    for part in places.split(max(1, BLOCK_ELEMENTS // vocabulary)):
        members = {name: group[part] for name, group in groups.items()}
        _add_lens(sums, [state[part] for state in states], labels[part], head, members)
    numbers = {name: int(group[places].sum()) for name, group in groups.items()}
    result = {name: total / (numbers.get(name, len(places)) or math.nan) for name, total in sums.items()}
    for name, values in result.items():
        values[: 2 if name in ("lens_kl", "peak_loop") else 1] = math.nan
    return result


def _add_lens(
    sums: dict[str, np.ndarray],
    states: Sequence[Tensor],
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    groups: Mapping[str, Tensor],
) -> None:
    previous: Tensor | None = None
    divergences = []
    for loop in range(1, len(states)):
        logits = head(states[loop]).float()
        current = logits.log_softmax(-1)
        truth = logits.gather(-1, labels[:, None])
        probabilities = current.exp()
        losses = -current.gather(-1, labels[:, None]).squeeze(-1).double()
        sums["lens_loss"][loop] += float(losses.sum())
        for name, group in groups.items():
            sums[name][loop] += float(losses[group].sum())
        sums["lens_rank"][loop] += float((logits > truth).sum() + len(labels))
        sums["lens_entropy"][loop] += float(torch.special.entr(probabilities).sum(-1).double().sum())
        if previous is not None:
            # Logits of minus infinity in both would give NaN.
            terms = torch.where(probabilities > 0, probabilities * (current - previous), 0.0)
            divergences.append(terms.sum(-1).clamp(min=0))
            sums["lens_kl"][loop] += float(divergences[-1].double().sum())
        previous = current
    if divergences:
        peaks = torch.stack(divergences).argmax(0) + 2
        sums["peak_loop"] += torch.bincount(peaks, minlength=len(states)).double().cpu().numpy()


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class Attention:
    """Causal softmax attention of one layer in one loop.

    Attributes:
        query: [H, T, D], after RoPE.
        key: [K, T, D], K divides H: head h reads key h // (H / K).
        scaling: factor of the scores.
        window: number of keys a query sees, itself included; None: all.
    """

    query: Tensor
    key: Tensor
    scaling: float
    window: int | None = None

    def log_probabilities(self, rows: slice, keys: slice, mask: Tensor) -> Tensor:
        """Return log-probabilities of queries over keys, float32 [H, rows, keys]. `mask` [rows, keys]: visible keys."""
        heads = self.key.shape[0]
        query = self.query[:, rows].float().unflatten(0, (heads, -1))
        scores = torch.einsum("kgqd,knd->kgqn", query, self.key[:, keys].float()) * self.scaling
        return scores.masked_fill(~mask, -torch.inf).log_softmax(-1).flatten(0, 1)


def attention_statistics(
    attention: Attention, previous: Attention | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the entropy of the attention and KL(attention || previous), for each head [H], as means over queries.

    Both are in nats, float64. The KL is None without `previous`, which must have the same shape and window.

    Args:
        documents: int [T], the document of each token, which sees no other document; None: one document.
    """
    heads, tokens, _ = attention.query.shape
    entropy = torch.zeros(heads, dtype=torch.float64, device=attention.query.device)
    divergence = None if previous is None else torch.zeros_like(entropy)
    assert previous is None or previous.window == attention.window
    reach = tokens if attention.window is None else min(attention.window, tokens)
    block = max(1, min(tokens, BLOCK_ELEMENTS // (heads * reach)))
    for first in range(0, tokens, block):
        rows = slice(first, min(first + block, tokens))
        keys = slice(max(0, first - reach + 1), rows.stop)
        mask = _seen(rows, keys, reach, documents, attention.query.device)
        logs = attention.log_probabilities(rows, keys, mask)
        probabilities = logs.exp()
        entropy += torch.special.entr(probabilities).sum((-1, -2), dtype=torch.float64)
        if previous is not None and divergence is not None:
            ratio = logs - previous.log_probabilities(rows, keys, mask)
            terms = torch.where(probabilities > 0, probabilities * ratio, 0.0)
            divergence += terms.sum((-1, -2), dtype=torch.float64)
    return entropy / tokens, None if divergence is None else (divergence / tokens).clamp(min=0)


def _seen(rows: slice, keys: slice, reach: int, documents: Tensor | None, device: torch.device) -> Tensor:
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(keys.start, keys.stop, device=device)[None]
    seen = (j <= i) & (i - j < reach)
    return seen if documents is None else seen & (documents[rows, None] == documents[None, keys])
