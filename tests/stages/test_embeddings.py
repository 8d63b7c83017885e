"""The text encoders, with real weights."""

import subprocess
import sys

import numpy as np
import pytest

from tiger_ray.ids.encoders import PACKAGED_MINILM, make_encoder
from tiger_ray.settings.embeddings import EmbeddingsSettings

pytestmark = pytest.mark.ray


TEXTS = ["red lipstick, matte", "matt lip colour in red", "stainless steel wrench set"]


def cosine(embedding_ND: np.ndarray) -> np.ndarray:
    unit_ND = embedding_ND / np.linalg.norm(embedding_ND, axis=1, keepdims=True)
    return unit_ND @ unit_ND.T


@pytest.fixture(scope="module")
def minilm():
    return make_encoder(EmbeddingsSettings(encoder="sentence-transformers", model=PACKAGED_MINILM))


def test_a_real_sentence_transformers_model_puts_like_texts_together(minilm):
    embedding_ND = minilm.encode(TEXTS)
    assert embedding_ND.shape == (3, 384)
    assert embedding_ND.dtype == np.float32
    near = cosine(embedding_ND)
    assert near[0, 1] > 0.7 > 0.3 > near[0, 2]


def test_an_embedding_does_not_depend_on_its_neighbours(minilm):
    together = minilm.encode([*TEXTS, "a much longer text " * 50])[:3]
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_hashing_encoder_gives_the_same_embedding_in_every_process():
    here = make_encoder(EmbeddingsSettings(dim=64), seed=3).encode(TEXTS)
    code = (
        "import sys; from tiger_ray.settings.embeddings import EmbeddingsSettings; from tiger_ray.ids.encoders import make_encoder;"
        f"sys.stdout.buffer.write(make_encoder(EmbeddingsSettings(dim=64), seed=3).encode({TEXTS!r}).tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=120).stdout
    assert here.tobytes() == there
    near = cosine(here)
    assert near[0, 1] > near[0, 2]
