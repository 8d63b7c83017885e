import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiger_ray.errors import ArtifactError
from tiger_ray.model.tokens import PAD, Vocabulary, pad_histories

VOCABULARY = Vocabulary((5, 4, 3), num_user_buckets=2)


def test_padding_levels_and_users_have_blocks_of_tokens_in_this_order():
    assert VOCABULARY.id_length == 3
    assert VOCABULARY.offsets == (1, 6, 10)
    assert VOCABULARY.user_offset == 13
    assert VOCABULARY.size == 15
    assert VOCABULARY.item_tokens(np.array([[0, 0, 0], [4, 3, 2]], np.int16)).tolist() == [
        [1, 6, 10],
        [5, 9, 12],
    ]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)), min_size=1))
def test_tokens_are_codewords_shifted_past_those_of_the_levels_before(codes):
    codes_NI = np.array(codes, np.int16)
    token_NI = VOCABULARY.item_tokens(codes_NI)
    assert token_NI.dtype == torch.int64
    assert PAD not in token_NI
    np.testing.assert_array_equal(token_NI.numpy() - codes_NI, np.broadcast_to([1, 6, 10], codes_NI.shape))


@pytest.mark.parametrize("codes", [[[0, 4, 0]], [[0, -1, 0]]])
def test_codewords_of_another_id_space_are_refused_by_level(codes):
    with pytest.raises(
        ArtifactError, match=r"level 1 .* codewords (4 to 4|-1 to -1), but this model knows 0 to 3"
    ):
        VOCABULARY.item_tokens(np.array(codes, np.int16))


def test_semantic_ids_of_another_length_are_refused():
    with pytest.raises(ArtifactError, match=r"shape \(1, 4\), but this model writes 3 codewords"):
        VOCABULARY.item_tokens(np.zeros((1, 4), np.int16))


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=6), st.booleans())
def test_padded_histories_equal_a_plain_loop(histories, with_user):
    item_tokens_NI = torch.arange(1, 22).view(7, 3)
    user_tokens_B = torch.arange(100, 100 + len(histories)) if with_user else None

    rows = []
    for number, history in enumerate(histories):
        row = [100 + number] if with_user else []
        for item in history:
            row += item_tokens_NI[item].tolist()
        rows.append(row + [PAD] * 3 * (max(map(len, histories)) - len(history)))

    flat = torch.tensor([item for history in histories for item in history])
    lengths_B = torch.tensor([len(history) for history in histories])
    assert pad_histories(item_tokens_NI[flat], lengths_B, user_tokens_B).tolist() == rows
