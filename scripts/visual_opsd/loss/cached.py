# Copyright 2026 The Visual-OPSD authors. SPDX-License-Identifier: Apache-2.0
"""A teacher that is not in memory: what is kept of its distributions, and the target made of it.

Kept of a token are the teacher's k most probable entries K, by their log-probabilities log t of the
full softmax at temperature 1, and the mass outside, t(tail) = 1 - sum of t over K. At temperature
T the loss compares

    without a tail   t_T = softmax(log t / T over K),         s_T = softmax(z / T over K)
    with a tail      t_T = softmax(log t / T over K + tail),  s_T = softmax(log s / T over K + tail)

where z are the student's logits, s its full softmax at temperature 1, and the tail is one event
more. As log t and the teacher's logits differ by a constant, the first is exactly the on-policy
loss on the teacher's top-k (`opsd_loss.py`), at any T. The second is the on-policy loss with a tail
bucket where T is 1; elsewhere that one would have to know every entry outside. Divergence, clip and
T^2 are those of `opsd_loss.py`; each token's divergence has a factor (`Entries.weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from data.teacher_cache import Entries
from scripts.visual_opsd.loss.chunk import Target, compute_dtype
from scripts.visual_opsd.opsd_loss import LossConfig


@torch.no_grad()
def read_entries(
    hidden: Tensor, head: Tensor, top_k: int, chunk_size: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of the teacher's distributions, the most probable entry first.

    Args:
        hidden: (N, H), final-norm outputs on the scored tokens; head: (V, H), same dtype.
        top_k: entries of a token; V if there are fewer.

    Returns:
        Log-probabilities (N, k) and log of the mass outside (N,), -inf where there is nothing, in
        at least fp32; entries (N, k) int64 between them.
    """
    vocab, kind = head.shape[0], compute_dtype(hidden)
    k = min(top_k, vocab)
    values = hidden.new_empty(len(hidden), k, dtype=kind)
    entries = torch.empty(values.shape, dtype=torch.int64, device=hidden.device)
    tail = hidden.new_empty(len(hidden), dtype=kind)
    for start in range(0, len(hidden), chunk_size):
        part = slice(start, start + chunk_size)
        log_t = F.log_softmax((hidden[part] @ head.t()).to(kind), dim=-1)
        values[part], entries[part] = log_t.topk(k, dim=-1)
        # A sum over the others: 1 - inside has no digits left where the entries hold nearly all.
        tail[part] = log_t.scatter_(-1, entries[part], -torch.inf).logsumexp(-1)
    return values, entries, tail


def cached_target(cached: Entries, config: LossConfig, vocab: int, kind: torch.dtype) -> Target:
    """The target from c tokens of a cache, in the compute dtype `kind`.

    With a top-k smaller than the cache's, the entries beyond it belong to the tail. Entropy and
    mass are those of the events (entries and tail), softened by T.
    """
    held = cached.entries.shape[1]
    k = config.top_k_of(vocab) or vocab
    assert k <= held, f"a cache of {held} entries a token cannot teach {k}"
    values, tail = cached.log_probs.to(kind), cached.tail.to(kind)
    if k < held:
        tail = torch.logaddexp(tail, values[:, k:].logsumexp(-1))
        values = values[:, :k]
    events = torch.cat([values, tail[:, None]], dim=-1) / config.temperature  # (c, k + 1)
    probabilities = events.softmax(-1)
    bucketed = config.tail_bucket and k < vocab
    kept = events if bucketed else values / config.temperature
    return Target(
        entropy=torch.special.entr(probabilities).sum(-1),
        topk_mass=1 - probabilities[:, -1],
        entries=cached.entries[:, :k].long(),
        log_probs=F.log_softmax(kept, dim=-1),
        weight=cached.weight.to(kind),
    )
