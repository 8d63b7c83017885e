"""A trained model arranged for decoding: the results of `TigerModel` in a fraction of its time.

B users in batch, T history tokens, I id_length, W beams, S levels written so far, V vocabulary, C codewords
of a level, D model width, H heads, K width of a head, A = H x K.

Differences from `TigerModel.forward`:

- a history is encoded once, and its cross-attention keys and values serve all beams of the user;
- keys and values of earlier codewords follow their beam by index;
- the first layers look up their projections by token, because these depend on the token only;
- scales of norms are multiplied into the next weights, products of one input are one product, and weights
  are packed once.

Matrix products are in the given precision; the residual stream and the logits are in float32.

Source: ours; the idea of one memory for all beams is that of xGR (arXiv 2512.11529) for decoder-only models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiger_ray.model.cpu_kernels import EPSILON
from tiger_ray.model.t5 import (
    MASKED,
    CrossAttentionLayer,
    FeedForwardLayer,
    Norm,
    SelfAttentionLayer,
    TigerModel,
)
from tiger_ray.model.tokens import PAD

LENGTH_MULTIPLE = 16
"""Padded histories may exceed `max_history` up to the next multiple of this number of tokens."""


Linear = Callable[[Tensor], Tensor]


class InferenceModel:
    """Encoder and step-by-step decoder with the weights of a `TigerModel`.

    Args:
        model: trained; it stays unchanged.
        dtype: precision of matrix products, float32 or bfloat16.
        device: device of the computation.
        temperature: divides the logits; above 1 it makes the probabilities more even.

    >>> from tiger_ray.model.tokens import Vocabulary
    >>> from tiger_ray.settings.model import ModelSettings
    >>> model = InferenceModel(TigerModel(ModelSettings(num_layers=1, d_model=16), Vocabulary((8, 8, 4))).eval())
    >>> state = model.start(torch.tensor([[1, 9, 17]]))
    >>> model.next_log_probs(torch.tensor([[PAD]]), state).shape
    torch.Size([1, 1, 8])
    """

    def __init__(
        self,
        model: TigerModel,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        temperature: float = 1.0,
    ) -> None:
        settings = model.settings
        self.vocabulary, self.max_history = model.vocabulary, settings.max_history
        self.dtype, self.device = dtype, torch.device(device)
        self._num_heads, self._d_kv = settings.num_heads, settings.d_kv
        id_length = self.vocabulary.id_length
        longest = settings.max_history * id_length + 1  # 1 for the user token
        longest += -longest % LENGTH_MULTIPLE
        with torch.no_grad():
            self._embedding_VD = model.shared.weight.detach().float().to(self.device)
            encoder, decoder = model.encoder.block, model.decoder.block
            bias = encoder[0].layer[0].SelfAttention.position_bias(longest, bidirectional=True)
            self._encoder_bias_HTT = bias[0].to(self.device, dtype)
            bias = decoder[0].layer[0].SelfAttention.position_bias(id_length, bidirectional=False)
            self._decoder_bias_IIH = bias[0].permute(1, 2, 0).to(self.device, dtype)
            self._encoder = [self._layer(*block.layer) for block in encoder]
            self._decoder = [self._layer(block.layer[0], block.layer[2]) for block in decoder]
            self._cross = [
                self._cross_layer(block.layer[1], model.encoder.final_layer_norm) for block in decoder
            ]
            # The projections of the first layers depend on the token only.
            self._encoder_table, self._decoder_table = (
                layers[0].project(self._norm(self._embedding_VD)) for layers in (self._encoder, self._decoder)
            )
            scale = (settings.d_model**-0.5 if settings.tie_embeddings else 1.0) / temperature
            # Keep fp32: rounding these weights to bf16 would change one recommendation in forty.
            weight_VD = self._scaled(model.decoder.final_layer_norm, model.lm_head.weight * scale)
            self._output = output_layers(weight_VD, model)

    def start(self, history_BT: Tensor) -> DecoderState:
        """Encode histories, and start the decoder's state.

        Args:
            history_BT: token ids, (B, T) int64, PAD after the end.
        """
        num_users, length = history_BT.shape
        bias_BHTT = self._encoder_bias_HTT[:, :length, :length].expand(num_users, -1, -1, -1)
        mask_B11T = None
        padding_BT = history_BT == PAD
        if padding_BT.device.type != "cpu" or padding_BT.any():  # any() on a GPU would force a sync
            mask_B11T = (padding_BT * MASKED).to(self.dtype)[:, None, None, :]
            bias_BHTT = bias_BHTT + mask_B11T
        bias_BHTT = bias_BHTT.contiguous()
        hidden_BTD = F.embedding(history_BT, self._embedding_VD)
        for number, layer in enumerate(self._encoder):
            if number == 0:
                projected = F.embedding(history_BT, self._encoder_table)
            else:
                projected = layer.project(self._norm(hidden_BTD))
            query, key, value = self._by_head(projected, 3)
            hidden_BTD += layer.out(attend(query, key, value, bias_BHTT))
            hidden_BTD += layer.feed_forward_out(layer.feed_forward(self._norm(hidden_BTD)))
        normed_BTD = self._norm(hidden_BTD)
        memory = [self._by_head(cross.project(normed_BTD), 2) for cross in self._cross]
        return DecoderState(memory, mask_B11T, [[] for _ in self._decoder])

    def next_log_probs(self, token_BW: Tensor, state: DecoderState) -> Tensor:
        """Log-probabilities of the codewords of the next level, normalized by `model.softmax`.

        Args:
            token_BW: last token of each beam, (B, W) int64; at the first level, PAD for one beam.
            state: result of `start`; this call adds the token.

        Returns:
            Natural log-probabilities, (B, W, C) float32, C the size of the level.
        """
        hidden_BWD = F.embedding(token_BW, self._embedding_VD)
        for number, (layer, cross) in enumerate(zip(self._decoder, self._cross, strict=True)):
            if number == 0:
                projected = F.embedding(token_BW, self._decoder_table)
            else:
                projected = layer.project(self._norm(hidden_BWD))
            read_BWA = self._read_written(projected, state.written[number])
            hidden_BWD += layer.out(read_BWA)
            query_BWA = cross.query(self._norm(hidden_BWD))
            (query,) = self._by_head(query_BWA, 1)
            key, value = state.memory[number]
            hidden_BWD += cross.out(attend(query, key, value, state.mask))
            hidden_BWD += layer.feed_forward_out(layer.feed_forward(self._norm(hidden_BWD)))
        logits, codewords = self._output[state.level]
        state.level += 1
        return logits(rms_norm(hidden_BWD)).log_softmax(-1)[..., codewords]

    def _read_written(self, projected_BW3A: Tensor, written: list[Tensor]) -> Tensor:
        """Self-attention of each beam to its own codewords, (B, W, A); adds the last codeword to `written`."""
        width = self._num_heads * self._d_kv
        query_BWA, last_BW2A = projected_BW3A[..., :width], projected_BW3A[..., width:]
        written.append(last_BW2A)
        num_levels = len(written)
        if num_levels == 1:
            return last_BW2A[..., width:]
        query_BWHK = self._heads(query_BWA, 1)[:, :, 0]
        keys, values = zip(*(self._heads(pair_BW2A, 2).unbind(2) for pair_BW2A in written), strict=True)
        # A batched product of tiny matrices, one for each beam and head, would take twice as long.
        score_SBWH = torch.stack([(query_BWHK * key_BWHK).sum(-1) for key_BWHK in keys])
        score_SBWH += self._decoder_bias_IIH[num_levels - 1, :num_levels, None, None]
        share_SBWH1 = score_SBWH.softmax(0)[..., None]
        read_BWHK = share_SBWH1[0] * values[0]
        for share_BWH1, value_BWHK in zip(share_SBWH1[1:], values[1:], strict=True):
            read_BWHK.addcmul_(share_BWH1, value_BWHK)
        return read_BWHK.flatten(2)

    def _norm(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden).to(self.dtype)

    def _by_head(self, projected_BTA: Tensor, count: int) -> tuple[Tensor, ...]:
        """`count` projections side by side to `count` tensors (B, H, T, K), in the layout that suits `attend`."""
        split = self._heads(projected_BTA, count).permute(2, 0, 3, 1, 4)
        return (split if reads_in_place(split) else split.contiguous()).unbind()

    def _heads(self, projected_BTA: Tensor, count: int) -> Tensor:
        """A view of `count` projections side by side, (B, T, count, H, K)."""
        return projected_BTA.view(*projected_BTA.shape[:2], count, self._num_heads, self._d_kv)

    def _linear(self, norm: Norm | None, *weights: Tensor, relu: bool = False) -> Linear:
        return linear(self._scaled(norm, *weights).to(self.dtype), relu=relu)

    def _scaled(self, norm: Norm | None, *weights: Tensor) -> Tensor:
        """Weights stacked along the outputs, times the scale of the preceding norm, fp32."""
        weight = torch.cat([weight.detach().float() for weight in weights])
        if norm is not None:
            weight = weight * norm.weight.detach().float()
        return weight.to(self.device)

    def _layer(self, attention: SelfAttentionLayer, feed_forward: FeedForwardLayer) -> Layer:
        of, dense = attention.SelfAttention, feed_forward.DenseReluDense
        return Layer(
            project=self._linear(attention.layer_norm, of.q.weight, of.k.weight, of.v.weight),
            out=self._linear(None, of.o.weight),
            feed_forward=self._linear(feed_forward.layer_norm, dense.wi.weight, relu=True),
            feed_forward_out=self._linear(None, dense.wo.weight),
        )

    def _cross_layer(self, cross: CrossAttentionLayer, memory_norm: Norm) -> CrossLayer:
        of = cross.EncDecAttention
        return CrossLayer(
            query=self._linear(cross.layer_norm, of.q.weight),
            project=self._linear(memory_norm, of.k.weight, of.v.weight),
            out=self._linear(None, of.o.weight),
        )


class Layer(NamedTuple):
    """Matrix products of self-attention and feed-forward, of encoder and decoder.

    >>> double = linear(2 * torch.eye(3))
    >>> Layer(double, double, double, double).out(torch.ones(3))
    tensor([2., 2., 2.])
    """

    project: Linear
    """Hidden states to queries, keys and values side by side."""
    out: Linear
    feed_forward: Linear
    feed_forward_out: Linear


class CrossLayer(NamedTuple):
    """Matrix products of attention to the history.

    >>> double = linear(2 * torch.eye(3))
    >>> CrossLayer(double, double, double).query(torch.ones(3))
    tensor([2., 2., 2.])
    """

    query: Linear
    project: Linear
    """Hidden states of the encoder to keys and values side by side."""
    out: Linear


@dataclass
class DecoderState:
    """The decoder's state between levels: keys and values of the history and of the codewords of each beam.

    >>> state = DecoderState([], None, [[torch.zeros(1, 1, 2), torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])]])
    >>> state.reorder(torch.tensor([[1, 1]]))
    >>> state.written[0][1].tolist()
    [[[2.0, 2.0], [2.0, 2.0]]]
    """

    memory: list[tuple[Tensor, ...]]
    """For each layer: keys and values of the history, (B, H, T, K) each."""
    mask: Tensor | None
    """Added to the scores of the history, (B, 1, 1, T); None: no padding."""
    written: list[list[Tensor]]
    """For each layer and level: keys beside values of the codeword, (B, W, 2A); one beam at the first level."""
    level: int = 0
    """Number of codewords written so far."""

    def reorder(self, beam_BW: Tensor) -> None:
        """Let beam w of each user continue the former beam `beam_BW[:, w]`, (B, W) int64."""
        num_users, width = beam_BW.shape
        for layer in self.written:
            for level, pair_BWA in enumerate(layer):
                beams = pair_BWA.shape[1]
                if beams > 1 or level > 0:
                    row_BW = torch.arange(num_users, device=beam_BW.device)[:, None] * beams + beam_BW
                    kept = pair_BWA.flatten(0, 1).index_select(0, row_BW.flatten())
                    layer[level] = kept.view(num_users, width, -1)


def output_layers(weight_VD: Tensor, model: TigerModel) -> list[tuple[Linear, slice]]:
    """For each level: the product that gives the logits to normalize over, and the slice of its codewords."""
    vocabulary = model.vocabulary
    blocks = [
        slice(first, first + size)
        for first, size in zip(vocabulary.offsets, vocabulary.level_sizes, strict=True)
    ]
    if model.settings.softmax == "vocabulary":
        whole = linear(weight_VD)
        return [(whole, block) for block in blocks]
    return [(linear(weight_VD[block].clone()), slice(None)) for block in blocks]


def rms_norm(hidden: Tensor) -> Tensor:
    """Hidden states, scaled to unit root mean square; the next weights contain the norm's scale."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=EPSILON)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of each query, without scaling.

    Args:
        query: (B, H, W, K) float.
        key: (B, H, T, K) float.
        value: (B, H, T, K) float.
        bias: added to the scores, (B, 1 or H, 1 or W, T) float, or None.

    Returns:
        (B, W, A) float.
    """
    num_users, num_heads, num_queries, _ = query.shape
    if reads_in_place(query):
        read = F.scaled_dot_product_attention(query, key, value, bias, scale=1.0)
    else:
        score = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
        if bias is None:
            share = softmax(torch.bmm(*score))
        else:
            bias = bias.expand(-1, num_heads, -1, -1).flatten(0, 1).expand(-1, num_queries, -1)
            share = softmax(torch.baddbmm(bias, *score))
        read = (share @ value.flatten(0, 1)).view(num_users, num_heads, num_queries, -1)
    return read.transpose(1, 2).flatten(2)


def reads_in_place(tensor: Tensor) -> bool:
    """True for tensors that torch's attention reads without copies: fp32 on a CPU.

    There it takes half the time of copies and products. For bf16 on a CPU, the products of oneDNN are faster.
    """
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def softmax(score: Tensor) -> Tensor:
    """Softmax over the last dimension."""
    if score.dtype == torch.bfloat16 and has_onednn(score):
        # torch's softmax for bf16 on a CPU takes three times as long.
        return score.to_mkldnn().softmax(-1).to_dense()
    return score.softmax(-1)


def linear(weight: Tensor, *, relu: bool = False) -> Linear:
    """The map x -> x weight^T, followed by a ReLU if `relu` is true."""
    if has_onednn(weight):
        # The call of torch.compile: it packs the weight once and fuses the ReLU. torch's own product in fp32
        # would use MKL, which is half as fast on AMD.
        packed, after = torch.ops.mkldnn._reorder_linear_weight(weight), "relu" if relu else "none"
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, after, [], "")
    if relu:
        return lambda x: F.linear(x, weight).relu_()
    return lambda x: F.linear(x, weight)


def has_onednn(tensor: Tensor) -> bool:
    """True if oneDNN can multiply this tensor: some builds of torch lack oneDNN, older CPUs lack bf16."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return tensor.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
