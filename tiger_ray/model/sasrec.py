"""SASRec: a causal transformer over item ids gives each history a vector, and items are ranked by inner product.

Source: Kang and McAuley 2018 (arXiv 1808.09781): item embeddings shared by input and output, learned
positions, pre-norm layers of self-attention and of a ReLU feed-forward network. As in the paper, histories
are padded on the left, so positions count from the newest item. Ours: a linear map after the heads, as in
torch's attention; a softmax over all items as a second loss; and a linear map after the last layer (a setting).

`training.loop.fit` trains the model on the same examples as TIGER: a history and its next item. This gives as
many losses per epoch as a loss at every place of every history.

B users, T history items, D model width, H heads, N items, E events of all users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger_ray.core.arrays import ranges
from tiger_ray.errors import ArtifactError
from tiger_ray.model.t5 import MASKED, Dropout
from tiger_ray.settings.sasrec import SasrecSettings

NO_ITEM = -1
"""Padding of histories."""


USERS_AT_ONCE = 1024
"""Histories that are padded and encoded together."""


class SasrecModel(nn.Module):
    """Histories to vectors, and the vectors of all items.

    Weights, gradient and two moments of AdamW take 16 N D bytes. The softmax loss computes (B, N) scores per
    batch, keeps their float32 log-probabilities for the backward pass (4 B N bytes), and takes 6 B N D
    operations: little at 10,000 items, but 10 GB at 10 million items and B = 256, where `training.batch_tokens`
    bounds B. The cost of the binary loss does not grow with N.

    >>> model = SasrecModel(SasrecSettings(d_model=16), num_items=100).eval()
    >>> model.user_vectors(np.array([5, 7, 9], np.int32), np.array([1, 2])).shape
    (2, 16)
    """

    def __init__(self, settings: SasrecSettings, num_items: int) -> None:
        super().__init__()
        self.settings = settings
        self.item = nn.Embedding(num_items, settings.d_model)
        self.position = nn.Embedding(settings.max_history, settings.d_model)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_layers))
        self.norm = nn.LayerNorm(settings.d_model)
        self.output_map = (
            nn.Linear(settings.d_model, settings.d_model, bias=False) if settings.output_map else None
        )
        self.dropout = Dropout(settings.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if self.output_map is not None:
            # Do not start near the identity: the model would rank items of the history first.
            nn.init.normal_(self.output_map.weight, std=settings.d_model**-0.5)

    def forward(self, history_BT: Tensor, target_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Loss of every target.

        Args:
            history_BT: item_index, (B, T) int64, `NO_ITEM` before the oldest.
            target_B: item_index of the next item, (B,) int64.
            label_smoothing: share of the target probability that is spread evenly over all outcomes: all items
                for the softmax loss, yes and no for the binary loss.

        Returns:
            Natural log loss, (B, 1) float32.
        """
        user_BD = self.users(history_BT)
        if self.settings.loss == "softmax":
            # One expression: a name for the scores would keep them in memory beside their log-probabilities.
            loss_B = F.cross_entropy(
                F.linear(user_BD, self.item.weight).float(),
                target_B,
                reduction="none",
                label_smoothing=label_smoothing,
            )
            return loss_B[:, None]
        other_B = torch.randint_like(target_B, self.item.num_embeddings - 1)
        other_B = other_B + (other_B >= target_B)
        score_B2 = (self.item(torch.stack([target_B, other_B], 1)) @ user_BD[..., None]).squeeze(-1).float()
        truth_2 = torch.tensor([1 - label_smoothing / 2, label_smoothing / 2], device=score_B2.device)
        losses_B2 = F.binary_cross_entropy_with_logits(
            score_B2, truth_2.expand_as(score_B2), reduction="none"
        )
        return losses_B2.sum(1, keepdim=True)

    def users(self, history_BT: Tensor) -> Tensor:
        """Vectors of histories, (B, D) float: the inner product with an item's vector is the item's score."""
        length = history_BT.shape[1]
        padding_BT = history_BT == NO_ITEM
        later_TT = torch.ones(length, length, dtype=torch.bool, device=history_BT.device).triu(1)
        masked_B1TT = later_TT | padding_BT[:, None, None, :]
        item_BTD = self.item(history_BT.clamp(min=0)) * self.settings.d_model**0.5
        hidden_BTD = self.dropout(item_BTD + self.position.weight[:length].flip(0))
        for layer in self.layers:
            # The user's vector is the hidden state of the newest place of the last layer.
            only_newest = layer is self.layers[-1]
            hidden_BTD = layer(hidden_BTD, masked_B1TT, only_newest)
        user_BD: Tensor = self.norm(hidden_BTD[:, -1])
        return user_BD if self.output_map is None else self.output_map(user_BD)

    @torch.inference_mode()
    def user_vectors(
        self, item_index: npt.NDArray[np.int32], lengths_B: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Vectors of users, (B, D) float32.

        Args:
            item_index: items of all histories one after the other, each oldest first, (E,) int32.
            lengths_B: items per history, (B,) int64, at least 1.
        """
        device, end_B = self.item.weight.device, np.cumsum(lengths_B)
        read_B = np.minimum(lengths_B, self.settings.max_history)
        user_BD = np.empty((len(lengths_B), self.settings.d_model), np.float32)
        by_length_B = np.argsort(read_B, kind="stable")
        for first in range(0, len(by_length_B), USERS_AT_ONCE):
            user_b = by_length_B[first : first + USERS_AT_ONCE]
            item_E = item_index[ranges(end_B[user_b] - read_B[user_b], read_B[user_b])]
            user_BD[user_b] = self.users(pad_left(item_E, read_B[user_b]).to(device)).cpu().numpy()
        return user_BD

    def to_files(self) -> dict[str, bytes]:
        """The model as files."""
        tensors = {name: weight.detach().float().cpu() for name, weight in self.named_parameters()}
        config = {
            "model_type": "sasrec",
            "tiger_ray": {
                "model": self.settings.model_dump(mode="json"),
                "num_items": self.item.num_embeddings,
            },
        }
        return {
            "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
            "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> SasrecModel:
        """The model that `to_files` wrote, in evaluation mode.

        Raises:
            ArtifactError: a file is missing or damaged, or the weights do not fit the settings.
        """
        for name in ("config.json", "model.safetensors"):
            if name not in files:
                raise ArtifactError(f"the model has no file {name}; it holds {sorted(files) or 'no files'}")
        try:
            config = json.loads(files["config.json"])
            if config["model_type"] != "sasrec":
                raise ValueError(f"model_type is {config['model_type']!r}")
            settings = SasrecSettings(**config["tiger_ray"]["model"])
            num_items = int(config["tiger_ray"]["num_items"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"config.json of the model is damaged or not SASRec's: {error!r}") from error
        try:
            tensors = safetensors.torch.load(files["model.safetensors"])
        except Exception as error:  # safetensors raises its own type, which is no ValueError
            raise ArtifactError(f"model.safetensors is damaged: {error}") from error
        model = cls(settings, num_items)
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(shapes.keys() | found.keys()):
            if shapes.get(name) != found.get(name):
                raise ArtifactError(
                    f"tensor {name} of model.safetensors has shape {found.get(name, 'none')}, "
                    f"but its config.json asks for {shapes.get(name, 'no such tensor')}"
                )
            if not tensors[name].isfinite().all():
                raise ArtifactError(
                    f"tensor {name} of model.safetensors holds values that are not finite numbers"
                )
        model.load_state_dict(tensors)
        return model.eval()


class Layer(nn.Module):
    """Self-attention, then a feed-forward network for each place: pre-norm, with residual connections.

    >>> layer = Layer(SasrecSettings(d_model=16))
    >>> layer(torch.zeros(2, 5, 16), torch.zeros(2, 1, 5, 5, dtype=torch.bool), only_newest=True).shape
    torch.Size([2, 1, 16])
    """

    def __init__(self, settings: SasrecSettings) -> None:
        super().__init__()
        width, self.num_heads = settings.d_model, settings.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, settings.d_ff)
        self.outer = nn.Linear(settings.d_ff, width)
        self.dropout = Dropout(settings.dropout)

    def forward(self, hidden_BTD: Tensor, masked_B1TT: Tensor, only_newest: bool) -> Tensor:
        """Hidden states after this layer.

        Args:
            hidden_BTD: hidden states before this layer, (B, T, D) float.
            masked_B1TT: true where a place (third axis) may not attend to a place (last axis), (B, 1, T, T) bool.
            only_newest: compute the newest place only.

        Returns:
            (B, T, D) float, or (B, 1, D) for the newest place only.
        """
        normed_BTD = self.attention_norm(hidden_BTD)
        asking = slice(-1 if only_newest else 0, None)
        query, key, value = (
            linear(part).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, part in (
                (self.query, normed_BTD[:, asking]),
                (self.key, normed_BTD),
                (self.value, normed_BTD),
            )
        )
        score_BHTT = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        weight_BHTT = score_BHTT.masked_fill(masked_B1TT[:, :, asking], MASKED).softmax(-1)
        read_BTD = (self.dropout(weight_BHTT) @ value).transpose(1, 2).flatten(2)
        hidden_BTD = hidden_BTD[:, asking] + self.dropout(self.out(read_BTD))
        inner = self.dropout(self.inner(self.feed_forward_norm(hidden_BTD)).relu())
        return hidden_BTD + self.dropout(self.outer(inner))


def pad_left(item_E: npt.NDArray[np.int32], lengths_B: npt.NDArray[np.int64]) -> Tensor:
    """Items of all histories one after the other, (E,), to a matrix (B, T) int64, `NO_ITEM` before the oldest."""
    longest = int(lengths_B.max())
    filled_BT = np.arange(longest) >= longest - lengths_B[:, None]
    history_BT = np.full(filled_BT.shape, NO_ITEM, np.int64)
    history_BT[filled_BT] = item_E
    return torch.from_numpy(history_BT)
