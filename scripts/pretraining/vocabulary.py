"""Vocabulary of the tiny base's pretraining: tokens with embeddings of their own, and their counts in the corpus."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pretraining.corpus import Conversations
from pretraining.network import VOCABULARY

from finetune.data.harmony.render import Example

LEAST_OCCURRENCES = 5  # tokens of the training documents that stand less often become the rest
_SMOOTHING = 0.1  # added to every token's count in the unigram model, the best of 0.01, 0.1 and 1 on validation texts


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens of the corpus.

    Attributes:
        tokens: ids of those with a row of their own, ascending.
        counts: how often each token occurs in the training documents.
        number_of: int64 [201,088], each token's row; `len(tokens)` for the rest.
    """

    tokens: list[int]
    counts: Counter[int]
    number_of: torch.Tensor

    @classmethod
    def of(cls, documents: Sequence[Example], conversations: Conversations) -> Vocabulary:
        """Count the documents' tokens; the conversations add what their fixed parts and answers consist of."""
        counts = Counter(token for sample in documents for token in sample.ids.tolist())
        around: Counter[int] = Counter()
        for sample in conversations.samples(np.random.default_rng(0)):
            around.update(set(sample.ids.tolist()))
        frequent = {token for token, count in counts.items() if count >= LEAST_OCCURRENCES}
        tokens = sorted(frequent | {token for token, count in around.items() if count >= LEAST_OCCURRENCES})
        number_of = torch.full((VOCABULARY,), len(tokens))
        number_of[torch.tensor(tokens)] = torch.arange(len(tokens))
        return cls(tokens, counts, number_of)

    @property
    def size(self) -> int:
        """C: rows, the rest's included."""
        return len(self.tokens) + 1

    @property
    def num_rest(self) -> int:
        """Tokens without a row of their own."""
        return VOCABULARY - len(self.tokens)

    def unigram_loss(self, samples: Sequence[Example]) -> float:
        """Nats per trained token of a model that knows only how often each token occurs in the training documents."""
        total = sum(self.counts.values()) + _SMOOTHING * VOCABULARY
        nll = [
            -math.log((self.counts[token] + _SMOOTHING) / total)
            for sample in samples
            for token in sample.ids[sample.weights > 0].tolist()
        ]
        return sum(nll) / len(nll)
