"""The same model in transformers, and its constrained `generate`: the oracle of model, decoding and export."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD, Vocabulary

if TYPE_CHECKING:  # each process that collects tests would wait three seconds for it
    from transformers import T5ForConditionalGeneration


def hugging_face(model: TigerModel) -> T5ForConditionalGeneration:
    """The same model, written down from the settings and not from our own config.json."""
    from transformers import T5Config, T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=model.vocabulary.size,
            d_model=model.settings.d_model,
            d_kv=model.settings.d_kv,
            d_ff=model.settings.d_ff,
            num_layers=model.settings.num_layers,
            num_heads=model.settings.num_heads,
            dropout_rate=0.0,
            tie_word_embeddings=model.settings.tie_embeddings,
            decoder_start_token_id=PAD,
            eos_token_id=None,
        )
    )
    if not model.settings.tie_embeddings:  # transformers 5 ties them all the same
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs.eval()


class LevelSoftmax:
    """Probabilities among the codewords of the next level; its other tokens become impossible."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._levels = list(zip(vocabulary.offsets, vocabulary.level_sizes, strict=True))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        first, size = self._levels[input_ids.shape[1] - 1]
        level = torch.full_like(scores, -torch.inf)
        level[:, first : first + size] = scores[:, first : first + size].log_softmax(-1)
        return level


def generate(
    theirs: T5ForConditionalGeneration,
    history: Sequence[int],
    item_tokens: Iterable[Sequence[int]],
    width: int,
    level_softmax: LevelSoftmax | None = None,
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Token ids of the best items after one history, best first, and their scores, (W,).

    Args:
        theirs: the model.
        history: its token ids.
        item_tokens: token ids of every item that may come out.
        width: beams W, and items.
        level_softmax: normalizes over a level; none: over the vocabulary.
    """
    from transformers import PrefixConstrainedLogitsProcessor

    items = [tuple(tokens) for tokens in item_tokens]

    def next_tokens(_: int, written: torch.Tensor) -> list[int]:
        prefix = tuple(written.tolist()[1:])
        return sorted({tokens[len(prefix)] for tokens in items if tokens[: len(prefix)] == prefix})

    # ahead of the constraint: transformers would put it behind
    ahead = [] if level_softmax is None else [level_softmax]
    generated = theirs.generate(
        torch.tensor([history]),
        num_beams=width,
        num_return_sequences=width,
        logits_processor=[*ahead, PrefixConstrainedLogitsProcessor(next_tokens, width)],
        max_new_tokens=len(items[0]),
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return [tuple(row[1:]) for row in generated.sequences.tolist()], generated.sequences_scores.numpy()
