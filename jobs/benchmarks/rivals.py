"""The same TIGER model in other libraries: Hugging Face transformers and CTranslate2.

B users in batch, T history tokens, I id_length, W beams, N items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from tiger_ray.model.t5 import EPSILON, TigerModel
from tiger_ray.model.tokens import PAD

END = "</s>"


class HuggingFace:
    """`generate` with `prefix_allowed_tokens_fn`, which only looks up the answers that were prepared for all prefixes."""

    def __init__(
        self,
        model: TigerModel,
        codes_NI: np.ndarray,
        precision: str,
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.settings = {"precision": precision, "batch_size": batch_size}
        self._model = hugging_face(model).to(device, dtype)
        tokens = [tuple(row) for row in model.vocabulary.item_tokens(codes_NI).tolist()]
        self._item = {row: item for item, row in enumerate(tokens)}
        children: dict[tuple[int, ...], set[int]] = {}
        for row in tokens:
            for level, token in enumerate(row):
                children.setdefault((PAD, *row[:level]), set()).add(token)
        self._children = {prefix: sorted(after) for prefix, after in children.items()}

    def recommend(self, history_BT: torch.Tensor, beam_width: int) -> tuple[np.ndarray, np.ndarray]:
        """item_index and score of the constrained search, each (B, W), best first."""
        found, score = [], []
        for token_BWI, score_BW in self.write(history_BT, beam_width, constrained=True):
            found += [[self._item[tuple(row)] for row in rows] for rows in token_BWI.tolist()]
            score.append(score_BW)
        return np.array(found), np.concatenate(score)

    def write(
        self, history_BT: torch.Tensor, beam_width: int, *, constrained: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens, (B, W, I), and scores, (B, W), batch by batch."""
        children, id_length = self._children, len(next(iter(self._item)))
        for history_bT in history_BT.split(self.settings["batch_size"]):
            generated = self._model.generate(
                history_bT.to(self._model.device),
                num_beams=beam_width,
                num_return_sequences=beam_width,
                prefix_allowed_tokens_fn=(
                    (lambda _, written: children[tuple(written.tolist())]) if constrained else None
                ),
                max_new_tokens=id_length,
                length_penalty=0.0,
                output_scores=True,
                return_dict_in_generate=True,
            )
            shape = (len(history_bT), beam_width)
            yield (
                generated.sequences[:, 1:].view(*shape, id_length).cpu().numpy(),
                generated.sequences_scores.float().view(shape).cpu().numpy(),
            )


class CTranslate2:
    """`translate_batch`, not constrained, so its output need not be an item."""

    def __init__(
        self, model: TigerModel, folder: str, kind: str, inter_threads: int, batch_size: int
    ) -> None:
        import ctranslate2

        self._id_length, cores = model.vocabulary.id_length, torch.get_num_threads()
        how = {
            "compute_type": {"fp32": "float32"}.get(kind, kind),
            "inter_threads": inter_threads,
            "intra_threads": cores // inter_threads,
        }
        self._translator = ctranslate2.Translator(folder, device="cpu", **how)
        # A new translator sets the OpenMP threads of this thread, and so the threads of torch, to intra_threads.
        torch.set_num_threads(cores)
        self.settings = {**how, "batch_size": batch_size}

    def write(self, histories: Sequence[Sequence[str]], beam_width: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, (B, W, I), and scores, (B, W), of histories as names of tokens."""
        results = self._translator.translate_batch(
            histories,
            beam_size=beam_width,
            num_hypotheses=beam_width,
            return_scores=True,
            length_penalty=0.0,
            min_decoding_length=self._id_length,
            max_decoding_length=self._id_length,
            max_batch_size=self.settings["batch_size"],
        )
        token_BWI = np.array([result.hypotheses for result in results], dtype=np.int64)
        return token_BWI, np.array([result.scores for result in results], dtype=np.float32)


def hugging_face(model: TigerModel, more_tokens: int = 0) -> T5ForConditionalGeneration:
    """The same weights in `T5ForConditionalGeneration`, with rows of zeros for further tokens."""
    settings = model.settings
    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=model.vocabulary.size + more_tokens,
            d_model=settings.d_model,
            d_kv=settings.d_kv,
            d_ff=settings.d_ff,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            decoder_start_token_id=PAD,
            eos_token_id=None,
            tie_word_embeddings=settings.tie_embeddings,
        )
    ).eval()
    size = model.vocabulary.size
    weights = {
        name: torch.nn.functional.pad(weight, (0, 0, 0, more_tokens)) if len(weight) == size else weight
        for name, weight in model.state_dict().items()
    }
    theirs.load_state_dict(weights)
    return theirs


def convert(model: TigerModel, folder: str) -> None:
    """Write the model as CTranslate2 reads it, with an end token, which CTranslate2 requires."""
    from ctranslate2.converters.transformers import T5Loader
    from ctranslate2.specs.common_spec import Activation
    from ctranslate2.specs.transformer_spec import (
        TransformerDecoderSpec,
        TransformerEncoderSpec,
        TransformerSpec,
    )

    settings, theirs, loader = model.settings, hugging_face(model, more_tokens=1), T5Loader()
    # The T5 loader of CTranslate2 assumes heads of width d_model / num_heads; heads of the paper's model are wider.
    options: dict[str, Any] = {
        "num_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "head_dim": settings.d_kv,
        "activation": Activation.RELU,
        "relative_attention_bias": True,
        "rms_norm": True,
    }
    spec = TransformerSpec(TransformerEncoderSpec(**options), TransformerDecoderSpec(**options))
    loader.set_stack(spec.encoder, theirs.encoder)
    loader.set_stack(spec.decoder, theirs.decoder, is_decoder=True)
    loader.set_linear(spec.decoder.projection, theirs.lm_head)
    if settings.tie_embeddings:
        spec.decoder.scale_outputs = np.dtype("float32").type(settings.d_model**-0.5)
    loader.set_vocabulary(spec, [*map(str, range(model.vocabulary.size)), END])
    config: dict[str, Any] = {"eos_token": END, "unk_token": "0", "bos_token": "0"}
    for name, value in {**config, "decoder_start_token": "0", "layer_norm_epsilon": EPSILON}.items():
        setattr(spec.config, name, value)
    spec.validate()
    spec.optimize()
    spec.save(folder)
