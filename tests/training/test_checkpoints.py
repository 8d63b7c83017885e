"""A checkpoint gives back what was saved, and refuses what is another model's."""

import pytest
import safetensors.torch
import torch

from tiger_ray.errors import ArtifactError
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress, load_state, save_state
from tiger_ray.training.loop import make_optimizer

VOCABULARY = Vocabulary((4, 4, 3))
TINY = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_kv": 4, "d_ff": 16}


def model_and_optimizer(**changed):
    model = TigerModel(ModelSettings(**(TINY | changed)), VOCABULARY)
    return model, make_optimizer(model, TrainingSettings())


@pytest.fixture
def saved():
    """A checkpoint after one step."""
    model, optimizer = model_and_optimizer()
    model(torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 5, 9]])).sum().backward()
    optimizer.step()
    progress = Progress()
    progress.add(1, 2.5, {"ndcg@10": 0.25}, model)
    return save_state(model, optimizer, progress)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_ff": 32}, r"checkpoint tensor .*has shape \(.*\); this model wants \(.*32"),
        ({"num_layers": 2}, r"checkpoint tensor .*is missing"),
    ],
)
def test_a_state_of_another_shape_is_refused(saved, changed, message):
    with pytest.raises(ArtifactError, match=message):
        load_state(saved, *model_and_optimizer(**changed))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-7],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: safetensors.torch.save(safetensors.torch.load(data)),
        lambda data: data.replace(b"curve", b"carve"),
    ],
    ids=["cut", "cut in the header", "empty", "without progress", "without curve"],
)
def test_a_damaged_state_is_refused(saved, damage):
    with pytest.raises(ArtifactError, match=r"checkpoint is damaged"):
        load_state(damage(saved), *model_and_optimizer())


def test_a_tie_keeps_the_earlier_checkpoint_and_patience_counts_from_it():
    model, _ = model_and_optimizer()
    progress = Progress()
    for step, ndcg in enumerate((0.2, 0.2, 0.1), start=1):
        progress.add(step, 1.0, {"ndcg@10": ndcg}, model)
    assert progress.chosen["step"] == 1
    assert progress.is_stale(2)
    assert not progress.is_stale(3)
    assert not progress.is_stale(None)
