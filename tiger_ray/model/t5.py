"""T5 encoder-decoder over Semantic-ID tokens: reads a history, writes the next item's codewords.

B users in batch, T history tokens, I id_length, V vocabulary, C codewords of a level, D model width (or width
of a head, beside H), H heads.

Arithmetic and parameter names are those of `T5ForConditionalGeneration` of Hugging Face transformers: ReLU
feed-forward, RMSNorm, one relative position bias for all layers, unscaled attention. Hence each reads the
weights of the other, and transformers is the oracle of the tests.

This module is for training; `decoding.inference` arranges the same weights for beam search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiger_ray.errors import ArtifactError
from tiger_ray.model.cpu_kernels import EPSILON, ReluDropout, RmsNorm, WholeHeads, dropout_mask
from tiger_ray.model.tokens import PAD, Vocabulary
from tiger_ray.settings.model import ModelSettings

NUM_POSITION_BUCKETS = 32


MAX_DISTANCE = 128


MASKED = -1e9  # finite: a row of -inf is NaN after softmax


class TigerModel(nn.Module):
    """T5 encoder-decoder whose vocabulary is codewords and user buckets.

    >>> model = TigerModel(ModelSettings(num_layers=1, d_model=16), Vocabulary((8, 8, 4)))
    >>> history_BT, target_BI = torch.tensor([[1, 9, 17]]), torch.tensor([[2, 10, 17]])
    >>> model(history_BT, target_BI).shape
    torch.Size([1, 3])
    """

    def __init__(self, settings: ModelSettings, vocabulary: Vocabulary) -> None:
        super().__init__()
        assert settings.num_user_buckets == vocabulary.num_user_buckets
        self.settings = settings
        self.vocabulary = vocabulary
        self.shared = nn.Embedding(vocabulary.size, settings.d_model)
        self.encoder = EncoderStack(settings, self.shared)
        self.decoder = DecoderStack(settings, self.shared)
        self.lm_head = nn.Linear(settings.d_model, vocabulary.size, bias=False)
        self._initialize()
        if settings.tie_embeddings:
            self.lm_head.weight = self.shared.weight

    def _initialize(self) -> None:
        """Draw normal weights with T5's deviations, which replace the scale of attention."""
        d_model, d_kv, d_ff = self.settings.d_model, self.settings.d_kv, self.settings.d_ff
        deviation = {
            "shared": 1.0,
            "q": (d_model * d_kv) ** -0.5,
            "o": (self.settings.num_heads * d_kv) ** -0.5,
            "wo": d_ff**-0.5,
        }
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation.get(name.rpartition(".")[2], d_model**-0.5))

    def forward(self, history_BT: Tensor, target_BI: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of every codeword of the target, given the history and the codewords before it.

        Args:
            history_BT: token ids, (B, T) int64, PAD after the end.
            target_BI: token ids of the next item, (B, I) int64.
            label_smoothing: share of the target probability that is spread evenly over the tokens that
                `model.softmax` normalizes over.

        Returns:
            Natural log loss, (B, I) float32.
        """
        hidden_BID = self._decode(history_BT, target_BI)

        def losses(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(hidden, weight).float()
            return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)

        weight_VD, vocabulary = self.lm_head.weight, self.vocabulary
        if self.settings.softmax == "vocabulary":
            return losses(hidden_BID.flatten(0, 1), weight_VD, target_BI.flatten()).view_as(target_BI)
        # Split once: the gradient is one matrix, while slices would make a whole matrix for each level.
        sizes = [1, *vocabulary.level_sizes, vocabulary.num_user_buckets]
        _, *weight_ICD, _ = torch.split(weight_VD, sizes)
        code_IB = [
            token_B - first for token_B, first in zip(target_BI.unbind(1), vocabulary.offsets, strict=True)
        ]
        levels = zip(hidden_BID.unbind(1), weight_ICD, code_IB, strict=True)
        return torch.stack([losses(*level) for level in levels], 1)

    def logits(self, history_BT: Tensor, target_BI: Tensor) -> Tensor:
        """Logits of every token at every codeword of the target, (B, I, V) float; arguments as in `forward`."""
        return F.linear(self._decode(history_BT, target_BI), self.lm_head.weight)

    def encode(self, history_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Histories as the decoder's memory.

        Args:
            history_BT: token ids, (B, T) int64, PAD after the end.

        Returns:
            Memory, (B, T, D) float, and the mask to add to attention scores, (B, 1, 1, T) float, or None if
            no token is padding.
        """
        padding_BT = history_BT == PAD
        mask_B11T = None
        if padding_BT.is_cuda or padding_BT.any():  # any() on a GPU would force a sync
            mask_B11T = torch.where(padding_BT, MASKED, 0.0)[:, None, None, :]
        return self.encoder(history_BT, mask_B11T), mask_B11T

    def _decode(self, history_BT: Tensor, target_BI: Tensor) -> Tensor:
        """Input of the output layer at each codeword of the target, (B, I, D)."""
        memory_BTD, mask_B11T = self.encode(history_BT)
        input_BI = F.pad(target_BI[:, :-1], (1, 0), value=PAD)
        hidden_BID: Tensor = self.decoder(input_BI, memory_BTD, mask_B11T)
        return hidden_BID * self.settings.d_model**-0.5 if self.settings.tie_embeddings else hidden_BID

    def to_files(self) -> dict[str, bytes]:
        """The model as files; Hugging Face's `T5ForConditionalGeneration.from_pretrained` reads them, too."""
        unique = dict(self.named_parameters())  # lists tied weights once
        tensors = {name: weight.detach().float().cpu().contiguous() for name, weight in unique.items()}
        config = {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "vocab_size": self.vocabulary.size,
            "d_model": self.settings.d_model,
            "d_kv": self.settings.d_kv,
            "d_ff": self.settings.d_ff,
            "num_layers": self.settings.num_layers,
            "num_decoder_layers": self.settings.num_layers,
            "num_heads": self.settings.num_heads,
            "relative_attention_num_buckets": NUM_POSITION_BUCKETS,
            "relative_attention_max_distance": MAX_DISTANCE,
            "dropout_rate": self.settings.dropout,
            "layer_norm_epsilon": EPSILON,
            "feed_forward_proj": "relu",
            "is_encoder_decoder": True,
            "tie_word_embeddings": self.settings.tie_embeddings,
            "pad_token_id": PAD,
            "decoder_start_token_id": PAD,
            "eos_token_id": None,
            "tiger_ray": {
                "model": self.settings.model_dump(mode="json"),
                "level_sizes": list(self.vocabulary.level_sizes),
            },
        }
        return {
            "model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"}),
            "config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> TigerModel:
        """The model that `to_files` wrote, in evaluation mode.

        Raises:
            ArtifactError: a file is missing or damaged, or the weights do not fit the settings.
        """
        for name in ("config.json", "model.safetensors"):
            if name not in files:
                raise ArtifactError(f"the model has no file {name}; it holds {sorted(files) or 'no files'}")
        settings, vocabulary = read_config(files["config.json"])
        try:
            tensors = safetensors.torch.load(files["model.safetensors"])
        except Exception as error:  # safetensors raises its own type, which is no ValueError
            raise ArtifactError(f"model.safetensors is damaged: {error}") from error
        model = cls(settings, vocabulary)
        expected = dict(model.named_parameters())
        for name in expected.keys() - tensors.keys():
            raise ArtifactError(f"model.safetensors lacks the tensor {name}, which its config.json asks for")
        for name, tensor in tensors.items():
            if name not in expected:
                raise ArtifactError(
                    f"model.safetensors holds the tensor {name}, which its config.json does not know"
                )
            if tensor.shape != expected[name].shape:
                raise ArtifactError(
                    f"tensor {name} of model.safetensors has shape {tuple(tensor.shape)}, "
                    f"but its config.json asks for {tuple(expected[name].shape)}"
                )
            if not tensor.isfinite().all():
                raise ArtifactError(
                    f"tensor {name} of model.safetensors holds values that are not finite numbers"
                )
        model.load_state_dict(tensors, strict=False)  # strict would ask for both names of tied weights
        return model.eval()


class EncoderStack(nn.Module):
    """Layers of self-attention and feed-forward.

    >>> stack = EncoderStack(ModelSettings(num_layers=1, d_model=16), nn.Embedding(9, 16))
    >>> stack(torch.tensor([[1, 2, 3, 4]]), None).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, settings: ModelSettings, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding
        blocks = [EncoderBlock(settings, layer == 0) for layer in range(settings.num_layers)]
        self.block = cast(Sequence[EncoderBlock], nn.ModuleList(blocks))
        self.final_layer_norm = Norm(settings.d_model)
        self.dropout = Dropout(settings.dropout)

    def forward(self, token_BT: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Hidden states, (B, T, D) float, of tokens, (B, T) int64; the mask is added to the scores."""
        length = token_BT.shape[1]
        bias = self.block[0].layer[0].SelfAttention.position_bias(length, bidirectional=True)
        if mask_B11T is not None:
            bias = bias + mask_B11T
        hidden: Tensor = self.dropout(self.embed_tokens(token_BT))
        for block in self.block:
            attention, feed_forward = block.layer
            hidden = feed_forward(attention(hidden, bias))
        hidden = self.dropout(self.final_layer_norm(hidden))
        return hidden


class DecoderStack(nn.Module):
    """Layers of causal self-attention, attention to the encoder's memory, and feed-forward.

    >>> stack = DecoderStack(ModelSettings(num_layers=1, d_model=16), nn.Embedding(9, 16))
    >>> stack(torch.tensor([[0, 2]]), torch.zeros(1, 4, 16), None).shape
    torch.Size([1, 2, 16])
    """

    def __init__(self, settings: ModelSettings, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = embedding
        blocks = [DecoderBlock(settings, layer == 0) for layer in range(settings.num_layers)]
        self.block = cast(Sequence[DecoderBlock], nn.ModuleList(blocks))
        self.final_layer_norm = Norm(settings.d_model)
        self.dropout = Dropout(settings.dropout)

    def forward(self, token_BI: Tensor, memory_BTD: Tensor, memory_mask_B11T: Tensor | None) -> Tensor:
        """Hidden states after all layers.

        Args:
            token_BI: token ids of the target, (B, I) int64, after the start token.
            memory_BTD: hidden states of the encoder, (B, T, D) float.
            memory_mask_B11T: added to the scores of the history, (B, 1, 1, T) float; None: no padding.

        Returns:
            (B, I, D) float.
        """
        length = token_BI.shape[1]
        bias = self.block[0].layer[0].SelfAttention.position_bias(length, bidirectional=False)
        later = torch.ones(length, length, dtype=torch.bool, device=token_BI.device).triu(1)
        bias = bias.masked_fill(later, MASKED)
        hidden: Tensor = self.dropout(self.embed_tokens(token_BI))
        for block in self.block:
            attention, cross_attention, feed_forward = block.layer
            hidden = feed_forward(cross_attention(attention(hidden, bias), memory_BTD, memory_mask_B11T))
        hidden = self.dropout(self.final_layer_norm(hidden))
        return hidden


class EncoderBlock(nn.Module):
    """One layer of the encoder.

    >>> [type(part).__name__ for part in EncoderBlock(ModelSettings(), is_first=True).layer]
    ['SelfAttentionLayer', 'FeedForwardLayer']
    """

    def __init__(self, settings: ModelSettings, is_first: bool) -> None:
        super().__init__()
        layers = [SelfAttentionLayer(settings, is_first), FeedForwardLayer(settings)]
        self.layer = cast(tuple[SelfAttentionLayer, FeedForwardLayer], nn.ModuleList(layers))


class DecoderBlock(nn.Module):
    """One layer of the decoder.

    >>> [type(part).__name__ for part in DecoderBlock(ModelSettings(), is_first=True).layer]
    ['SelfAttentionLayer', 'CrossAttentionLayer', 'FeedForwardLayer']
    """

    def __init__(self, settings: ModelSettings, is_first: bool) -> None:
        super().__init__()
        layers = [
            SelfAttentionLayer(settings, is_first),
            CrossAttentionLayer(settings),
            FeedForwardLayer(settings),
        ]
        self.layer = cast(
            tuple[SelfAttentionLayer, CrossAttentionLayer, FeedForwardLayer], nn.ModuleList(layers)
        )


class SelfAttentionLayer(nn.Module):
    """Self-attention: norm, attention between the tokens, residual connection.

    >>> layer = SelfAttentionLayer(ModelSettings(d_model=16, num_heads=2), is_first=True)
    >>> layer(torch.zeros(1, 4, 16), torch.zeros(1, 2, 4, 4)).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, settings: ModelSettings, is_first: bool) -> None:
        super().__init__()
        self.SelfAttention = Attention(settings, has_position_bias=is_first)
        self.layer_norm = Norm(settings.d_model)
        self.dropout = Dropout(settings.dropout)

    def forward(self, hidden_BTD: Tensor, bias: Tensor) -> Tensor:
        """Hidden states after this sublayer, (B, T, D); `bias` is added to the scores, (1 or B, H, T, T)."""
        query, key, value = self.SelfAttention.queries_keys_values(self.layer_norm(hidden_BTD))
        hidden_BTD = hidden_BTD + self.dropout(self.SelfAttention(query, key, value, bias))
        return hidden_BTD


class CrossAttentionLayer(nn.Module):
    """Cross-attention: norm, attention from the target to the history, residual connection.

    >>> layer = CrossAttentionLayer(ModelSettings(d_model=16))
    >>> layer(torch.zeros(1, 2, 16), torch.zeros(1, 4, 16), None).shape
    torch.Size([1, 2, 16])
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.EncDecAttention = Attention(settings, has_position_bias=False)
        self.layer_norm = Norm(settings.d_model)
        self.dropout = Dropout(settings.dropout)

    def forward(self, hidden_BID: Tensor, memory_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        """Hidden states after this sublayer, (B, I, D).

        Args:
            hidden_BID: hidden states of the target, (B, I, D) float.
            memory_BTD: hidden states of the encoder, (B, T, D) float.
            mask_B11T: added to the scores of the history, (B, 1, 1, T) float; None: no padding.
        """
        query = self.EncDecAttention.queries(self.layer_norm(hidden_BID))
        key, value = self.EncDecAttention.keys_values(memory_BTD)
        hidden_BID = hidden_BID + self.dropout(self.EncDecAttention(query, key, value, mask_B11T))
        return hidden_BID


class FeedForwardLayer(nn.Module):
    """Feed-forward: norm, feed-forward network of each token, residual connection.

    >>> FeedForwardLayer(ModelSettings(d_model=16))(torch.zeros(1, 4, 16)).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.DenseReluDense = FeedForward(settings)
        self.layer_norm = Norm(settings.d_model)
        self.dropout = Dropout(settings.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states after this sublayer."""
        hidden = hidden + self.dropout(self.DenseReluDense(self.layer_norm(hidden)))
        return hidden


class FeedForward(nn.Module):
    """Two linear maps around a ReLU.

    >>> FeedForward(ModelSettings(d_model=16))(torch.zeros(1, 4, 16)).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.wi = nn.Linear(settings.d_model, settings.d_ff, bias=False)
        self.wo = nn.Linear(settings.d_ff, settings.d_model, bias=False)
        self.dropout = Dropout(settings.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states to hidden states, (..., D)."""
        hidden = self.wi(hidden)
        if self.training and self.dropout.p and not hidden.is_cuda:
            hidden = ReluDropout.apply(hidden, self.dropout.p)  # type: ignore[no-untyped-call]
        else:
            hidden = self.dropout(hidden.relu_())
        hidden = self.wo(hidden)
        return hidden


class Attention(nn.Module):
    """Multi-head attention without scaling: T5 puts the scale into the initial weights.

    >>> attention = Attention(ModelSettings(d_model=16), has_position_bias=False)
    >>> query, key, value = attention.queries_keys_values(torch.zeros(1, 4, 16))
    >>> attention(query, key, value, None).shape
    torch.Size([1, 4, 16])
    """

    def __init__(self, settings: ModelSettings, *, has_position_bias: bool) -> None:
        super().__init__()
        width = settings.num_heads * settings.d_kv
        self.q = nn.Linear(settings.d_model, width, bias=False)
        self.k = nn.Linear(settings.d_model, width, bias=False)
        self.v = nn.Linear(settings.d_model, width, bias=False)
        self.o = nn.Linear(width, settings.d_model, bias=False)
        if has_position_bias:
            self.relative_attention_bias = nn.Embedding(NUM_POSITION_BUCKETS, settings.num_heads)
        self.num_heads = settings.num_heads
        self.dropout = Dropout(settings.dropout)

    def queries(self, hidden_BTD: Tensor) -> Tensor:
        """Queries, (B, H, T, D of a head)."""
        (query,) = self._project(hidden_BTD, self.q)
        return query

    def keys_values(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, H, T, D of a head)."""
        key, value = self._project(hidden_BTD, self.k, self.v)
        return key, value

    def queries_keys_values(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, D of a head)."""
        query, key, value = self._project(hidden_BTD, self.q, self.k, self.v)
        return query, key, value

    def _project(self, hidden_BTD: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
        # One wide product is faster than several narrow products; joining the weights costs little.
        weight = torch.cat([linear.weight for linear in maps]) if len(maps) > 1 else maps[0].weight
        projected = F.linear(hidden_BTD, weight).view(*hidden_BTD.shape[:2], len(maps), self.num_heads, -1)
        parts: tuple[Tensor, ...] = WholeHeads.apply(projected)  # type: ignore[no-untyped-call]
        return parts

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention of each query.

        Args:
            query: (B, H, queries, D of a head) float.
            key, value: (B, H, T, D of a head) float.
            bias: added to the scores, broadcast to (B, H, queries, T); None: 0.

        Returns:
            (B, queries, D) float.
        """
        if query.is_cuda:
            dropped = self.dropout.p if self.training else 0.0
            read_BHTD = F.scaled_dot_product_attention(query, key, value, bias, dropped, scale=1.0)
        else:
            # On a CPU, at these lengths, plain products in the precision of the queries are twice as fast.
            with torch.autocast("cpu", enabled=False):
                score_BHTT = query @ key.transpose(2, 3)
                if bias is not None:
                    score_BHTT = score_BHTT + bias.to(score_BHTT.dtype)
                read_BHTD = self.dropout(score_BHTT.softmax(-1)) @ value
        read: Tensor = self.o(read_BHTD.transpose(1, 2).flatten(2))
        return read

    def position_bias(self, length: int, *, bidirectional: bool) -> Tensor:
        """Bias of relative positions, added to the scores, (1, H, T, T), T = `length`."""
        weight = self.relative_attention_bias.weight
        place = torch.arange(length, device=weight.device)
        bucket = position_bucket(place[None, :] - place[:, None], bidirectional=bidirectional)
        return F.embedding(bucket, weight).permute(2, 0, 1)[None]


def position_bucket(distance: Tensor, *, bidirectional: bool) -> Tensor:
    """Bucket of each distance key - query: one per near distance, logarithmic up to `MAX_DISTANCE`, one beyond.

    Source: Raffel et al. 2020, section 2.1, as in Mesh TensorFlow.
    """
    num_buckets, first = NUM_POSITION_BUCKETS, torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0) * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.clamp(min=exact) / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class Norm(nn.Module):
    """RMSNorm: scales, does not shift.

    >>> round(Norm(2)(torch.tensor([[3.0, 4.0]])).square().mean().item(), 3)
    1.0
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states, scaled to unit root mean square, times the weight."""
        if hidden.is_cuda:
            return F.rms_norm(hidden, self.weight.shape, self.weight, EPSILON)
        normed: Tensor = RmsNorm.apply(hidden, self.weight)  # type: ignore[no-untyped-call]
        return normed


class Dropout(nn.Module):
    """Sets the share `p` of its input to zero in training, and scales up the rest.

    >>> Dropout(0.5).eval()(torch.ones(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, hidden: Tensor) -> Tensor:
        """The input in evaluation; in training, the input with some elements set to zero."""
        if not self.training or self.p == 0.0:
            return hidden
        if hidden.is_cuda:
            return F.dropout(hidden, self.p)
        return hidden * dropout_mask(hidden.shape, self.p).to(hidden.dtype).mul_(1 / (1 - self.p))


def read_config(config: bytes) -> tuple[ModelSettings, Vocabulary]:
    """Settings and vocabulary from the bytes of `config.json`, without the weights.

    Raises:
        ArtifactError: the bytes are damaged, or another program wrote them.
    """
    try:
        ours = json.loads(config)["tiger_ray"]
        settings = ModelSettings(**ours["model"])
        return settings, Vocabulary(tuple(ours["level_sizes"]), settings.num_user_buckets)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"config.json of the model is damaged or not tiger_ray's: {error!r}") from error
