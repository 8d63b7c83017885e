"""What Hugging Face's T5 and its constrained `generate` make of the same weights is what ours make of them."""

import numpy as np
import pytest
import torch

from tests.hugging_face import LevelSoftmax, generate, hugging_face
from tests.tiny_models import catalog_of, histories_of, padded_batch, split, tiny_model
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.model.tokens import PAD
from tiger_ray.settings.decoding import DecodingSettings

LEVEL_SIZES = (4, 3, 3, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_loss_and_gradients_equal_those_of_hugging_face(tied):
    ours = tiny_model(tie_embeddings=tied)
    theirs = hugging_face(ours)
    history_BT, target_BI = padded_batch()
    expected = theirs(input_ids=history_BT, attention_mask=(history_BT != PAD).long(), labels=target_BI)

    torch.testing.assert_close(ours.logits(history_BT, target_BI), expected.logits, atol=1e-4, rtol=0)
    loss = ours(history_BT, target_BI).mean()
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    loss.backward()
    expected.loss.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_weights_of_hugging_face_load_strictly():
    theirs = hugging_face(tiny_model())
    ours = tiny_model(num_layers=2)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    history_BT, target_BI = padded_batch()
    expected = theirs(input_ids=history_BT, attention_mask=(history_BT != PAD).long(), labels=target_BI)
    torch.testing.assert_close(ours.logits(history_BT, target_BI), expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softmax", ["vocabulary", "level"])
def test_hugging_face_reads_the_files(tmp_path, tied, softmax):
    from transformers import T5ForConditionalGeneration

    ours = tiny_model(tie_embeddings=tied, softmax=softmax)
    for name, data in ours.to_files().items():
        (tmp_path / name).write_bytes(data)
    theirs, report = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    history_BT, target_BI = padded_batch()
    expected = theirs(input_ids=history_BT, attention_mask=(history_BT != PAD).long(), labels=target_BI)
    torch.testing.assert_close(ours.logits(history_BT, target_BI), expected.logits, atol=1e-5, rtol=0)


def test_initial_weights_deviate_as_those_of_hugging_face():
    sizes = {"d_model": 64, "num_heads": 4, "d_kv": 32, "d_ff": 256}
    ours = tiny_model(**sizes)
    theirs = hugging_face(ours)
    theirs.init_weights()
    for name, weight in theirs.named_parameters():
        if weight.numel() < 1000:  # too few numbers to know a deviation by
            continue
        assert ours.get_parameter(name).std().item() == pytest.approx(weight.std().item(), rel=0.1), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("softmax", ["vocabulary", "level"])
@pytest.mark.parametrize("width", [7, 10, 50])
def test_beam_search_equals_generate_of_hugging_face(width, softmax, tied):
    model = tiny_model(LEVEL_SIZES, num_user_buckets=0, softmax=softmax, tie_embeddings=tied)
    codes_NI = catalog_of(LEVEL_SIZES, 0, 70)
    eligible_N = np.arange(70) % 5 != 0
    item_index, lengths_B = histories_of(0, 4, 70)
    decoder = Decoder(model, codes_NI, eligible_N, DecodingSettings(beam_width=width))
    found_BW, score_BW = decoder.recommend(item_index, lengths_B, None, width)

    theirs = hugging_face(model)
    level_softmax = LevelSoftmax(model.vocabulary) if model.settings.softmax == "level" else None
    tokens = model.vocabulary.item_tokens(codes_NI).tolist()
    item_of = {tuple(tokens[item]): item for item in np.flatnonzero(eligible_N)}
    for user, history in enumerate(split(item_index, lengths_B)):
        read = [token for item in history for token in tokens[item]]
        found, score = generate(theirs, read, item_of, width, level_softmax)
        assert found_BW[user].tolist() == [item_of[row] for row in found]
        np.testing.assert_allclose(score_BW[user], score, atol=1e-4)
