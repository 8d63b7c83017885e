"""Measure decoding and training on a GPU: equality with the CPU, speed, and quality after the paper's budget.

    python jobs/benchmarks/gpu.py --json gpu.json
    python jobs/benchmarks/gpu.py --only quality --world beauty.npz --seeds 3 --steps 20000 --json quality.json

Needs torch, transformers, pyarrow, pandas, pydantic-settings, pyyaml and safetensors, but neither Ray nor boto3 nor
a network: one script for a machine that is lent for minutes. The planted model and items are those of `decode.py`
and `train.py`. The part `quality` trains on a real world, one file that is made beforehand, where all of tiger_ray is
installed, from what a night published:

    python jobs/benchmarks/gpu.py --export ROOT --date 2026-11-26 --world beauty.npz

With `--device cpu --small` everything runs anywhere, on a thousandth of the work; such figures mean nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted import Users, beauty_examples, first, full_users, planted_codes, planted_decoder, planted_model
from results import Claims, chosen_parts, parser_of, run_parts

from tiger_ray.core.arrays import ranges
from tiger_ray.core.logs import show_logs
from tiger_ray.data.histories import HELD_OUT
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.evaluation import metrics as evaluation
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary, pad_histories
from tiger_ray.rankers.base import Histories, Rules
from tiger_ray.rankers.tiger import VALIDATION_BEAM_WIDTH, TigerRanker
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.model import ModelSettings
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress
from tiger_ray.training.collate import tiger_collate, tokens_of
from tiger_ray.training.examples import Examples
from tiger_ray.training.log import TrainingLog, peak_operations_per_s
from tiger_ray.training.loop import BATCH_TOKENS, fit, make_optimizer
from tiger_ray.training.validation import Validation

ROUNDS = 5
PAPER_STEPS, PAPER_BATCH = 200_000, 256


def main() -> None:
    show_logs(with_time=False)
    parts = {
        "answers": measure_answers,
        "decoding": measure_decoding,
        "training": measure_training,
        "quality": measure_quality,
    }
    parser = parser_of(__doc__, parts)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="a thousandth of the work, to try the script")
    parser.add_argument("--world", type=Path, help="file of the part quality")
    parser.add_argument("--export", help="write that file from what this storage root published, and end")
    parser.add_argument("--date", help="of the night to export")
    parser.add_argument("--seeds", type=int, default=1, help="models that the part quality trains")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each")
    parser.add_argument("--batch", type=int, default=PAPER_BATCH, help="examples of each step")
    parser.add_argument("--beam", type=int, default=50, help="beam width of the test")
    words = parser.parse_args()
    if words.export:
        export(words.export, words.date, words.world)
        return
    chosen = chosen_parts(parser, words, parts)
    if words.world is None and "quality" in chosen:
        chosen.remove("quality")
    words.device = torch.device(words.device)
    claims = Claims()
    claims.settings |= {"rounds": ROUNDS, "torch": torch.__config__.show(), "small": words.small}
    if words.device.type == "cuda":
        claims.settings["card"] = torch.cuda.get_device_name()
    run_parts(chosen, parts, claims, words, words.json)


def seconds_of(work: Any, device: torch.device) -> float:
    """Seconds of one run, all kernels included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# The same answers


def measure_answers(claims: Claims, words: Any) -> None:
    """Compare items and gradients with those of the CPU: equal in fp32, nearly equal in bf16."""
    users = full_users(16 if words.small else 512)
    there = planted_decoder(20, "fp32", device=words.device)
    for exclude in (False, True):
        found, score = planted_decoder(20, "fp32").recommend(*users, None, 20, exclude_history=exclude)
        mine, my_score = there.recommend(*users, None, 20, exclude_history=exclude)
        name = "_without_history" if exclude else ""
        claims.add(f"fp32_same_places{name}", float((found == mine).mean()), "of all places", ">= 0.999")
        claims.add(f"fp32_score_difference{name}", float(np.abs(score - my_score).max()), "nats", "<= 1e-4")
    rounded, _ = planted_decoder(20, "bf16", device=words.device).recommend(*users, None, 10)
    found, _ = there.recommend(*users, None, 10)
    same = (found[:, :, None] == rounded[:, None, :]).any(axis=2).mean()
    claims.add("bf16_overlap_10", float(same), "of the best ten", ">= 0.98")
    expected = gradients("fp32", torch.device("cpu"))
    exact, rounded = (gradients(precision, words.device) for precision in ("fp32", "bf16"))
    apart = [(exact[name] - of).abs().max() / of.abs().max() for name, of in expected.items()]
    claims.add("fp32_gradient_difference", float(max(apart)), "of a weight's largest", "<= 1e-3")
    cosines = [torch.cosine_similarity(rounded[name], of, dim=0) for name, of in expected.items()]
    claims.add("bf16_gradient_cosine", float(min(cosines)), "least of all weights", ">= 0.99")


def gradients(precision: str, device: torch.device) -> dict[str, torch.Tensor]:
    """Flat gradient of each weight, on a few examples without dropout."""
    model = TigerModel.from_files(planted_model().to_files()).to(device)
    (batch,) = next(beauty_examples(None).batches(16, id_length=model.vocabulary.id_length))
    history_BT, target_BI = tokens_of(batch, planted_codes(), model.vocabulary)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss_BI = model(history_BT.to(device), target_BI.to(device))
    loss_BI.mean().backward()
    return {name: weight.grad.float().cpu().flatten() for name, weight in model.named_parameters()}


# Decoding


def measure_decoding(claims: Claims, words: Any) -> None:
    """Users per second from arrays to arrays, beside Hugging Face on the same card."""
    from rivals import HuggingFace

    for beam_width, count, target in ((10, 65_536, ">= 100,000"), (50, 16_384, ">= 30,000")):
        users = full_users(count // 1000 if words.small else count)
        decoder = planted_decoder(beam_width, "bf16", device=words.device)
        work = partial(decoder.recommend, *users, None, beam_width)
        work()  # records the graphs
        ours = [len(users[1]) / seconds_of(work, words.device) for _ in range(ROUNDS)]
        claims.add(f"users_per_s_beam{beam_width}", ours, "users/s, bf16", target)
        few = first(users, 8 if words.small else 512)
        history_BT = histories_of(few)
        theirs = [0.0]
        for batch_size in (64, 256):
            rival = HuggingFace(planted_model(), planted_codes(), "bf16", batch_size, words.device)
            run = partial(rival.recommend, history_BT, beam_width)
            run()
            rates = [len(few[1]) / seconds_of(run, words.device) for _ in range(2)]
            theirs = max(theirs, rates, key=np.median)
        claims.add(f"hf_users_per_s_beam{beam_width}", theirs, "users/s, bf16")
        claims.add(f"hf_ratio_beam{beam_width}", float(np.median(ours) / np.median(theirs)), "times")


def histories_of(users: Users) -> torch.Tensor:
    """Token ids of histories, (B, T) int64."""
    items, lengths_B = users
    tokens_NI = planted_model().vocabulary.item_tokens(planted_codes())
    return pad_histories(tokens_NI[items], torch.from_numpy(lengths_B), None)


# Training


def measure_training(claims: Claims, words: Any) -> None:
    """Examples per second of the training loop, and how long the paper's budget would take."""
    for batch in (PAPER_BATCH, 1024, 4096):
        steps = 3 if words.small else 60
        settings = TrainingSettings(global_batch_size=16 if words.small else batch, num_steps=steps * ROUNDS)
        model = TigerModel.from_files(planted_model().to_files()).to(words.device).train()
        seen: list[dict[str, float]] = []
        peak = peak_operations_per_s(words.device, torch.bfloat16)
        log = TrainingLog(
            steps, settings.num_steps, words.device, peak, [lambda _, values, seen=seen: seen.append(values)]
        )
        batches = beauty_examples(words.beauty).batches(
            settings.global_batch_size,
            id_length=model.vocabulary.id_length,
            batch_tokens=BATCH_TOKENS[words.device.type],
        )
        optimizer, collate = make_optimizer(model, settings), tiger_collate(model, planted_codes())
        fit(model, optimizer, batches, collate, settings, Progress(), log, seed=0)
        windows = [values for values in seen if "training/examples_per_s" in values][1:]
        rates = [values["training/examples_per_s"] for values in windows]
        claims.add(f"examples_per_s_batch{batch}", rates, "examples/s, bf16")
        shares = [values["training/peak_share"] for values in windows]
        claims.add(f"peak_share_batch{batch}", shares, "of the rate of matrix products")
        minutes = PAPER_STEPS * PAPER_BATCH / float(np.median(rates)) / 60
        claims.add(f"paper_budget_minutes_batch{batch}", minutes, "minutes for 51.2 million examples", "< 10")


# Quality


@dataclass(frozen=True)
class World:
    """Histories of all users and the Semantic IDs of all items."""

    item_E: np.ndarray
    lengths_U: np.ndarray
    user_hash_U: np.ndarray
    codes_NI: np.ndarray
    eligible_N: np.ndarray
    level_sizes: tuple[int, ...]

    @classmethod
    def read(cls, file: Path) -> World:
        """Read a world that `export` wrote."""
        there = np.load(file)
        arrays = [there[name] for name in ("item_E", "lengths_U", "user_hash_U", "codes_NI", "eligible_N")]
        return cls(*arrays, tuple(there["level_sizes"].tolist()))

    def hold_out(self, held_out: int, chosen_U: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Histories without the last `held_out` events, their lengths, and the first held-out event."""
        first_U = np.cumsum(self.lengths_U) - self.lengths_U
        lengths_U = (self.lengths_U - held_out)[chosen_U]
        places = ranges(first_U[chosen_U], lengths_U)
        return self.item_E[places], lengths_U, self.item_E[first_U[chosen_U] + lengths_U].astype(np.int64)


def export(root: str, date: str, file: Path) -> None:
    """Write the world of a published night, leave-one-out and everything in one file."""
    from tiger_ray.artifacts.storage import Storage
    from tiger_ray.data.histories import user_shards
    from tiger_ray.published.semantic_ids import load_semantic_ids

    storage = Storage(root)
    sequences = storage.resolve("sequences", date)
    ids = load_semantic_ids(storage, storage.resolve("semantic_ids", date))
    columns = ["history", "user_hash"]
    tables = [storage.read_table(sequences, entry.name, columns=columns) for entry in user_shards(sequences)]
    histories = [table.column("history").combine_chunks() for table in tables]
    np.savez(
        file,
        item_E=np.concatenate([history.flatten().to_numpy() for history in histories]),
        lengths_U=np.concatenate([np.diff(history.offsets.to_numpy()) for history in histories]).astype(
            np.int64
        ),
        user_hash_U=np.concatenate([table.column("user_hash").to_numpy() for table in tables]),
        codes_NI=ids.codes_NI,
        eligible_N=ids.eligible_N,
        level_sizes=np.array(ids.level_sizes),
    )


def measure_quality(claims: Claims, words: Any) -> None:
    """Plain TIGER on the test event of every user: item level, leave-one-out, full ranking, no mask."""
    world, curves = World.read(words.world), []
    assert world.lengths_U.min() > HELD_OUT, (
        "some users are too short to be evaluated; the 5-core sets have none"
    )
    settings = TrainingSettings(
        num_steps=words.steps,
        global_batch_size=words.batch,
        checkpoint_every_steps=max(1, words.steps // 20),
        warmup_steps=min(2000, words.steps // 10),
        log_every_steps=max(1, words.steps // 20),
        validation_users=200 if words.small else 5000,
    )
    claims.settings |= {"training": settings.model_dump(mode="json"), "beam_width": words.beam}
    found: dict[str, list[float]] = {}
    for seed in range(words.seeds):
        start = time.perf_counter()
        model, curve = train_best(world, settings, seed, words.device)
        curves.append(curve)
        minutes = (time.perf_counter() - start) / 60
        for name, value in {**measure_ranking(world, model, words), "training_minutes": minutes}.items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        claims.add(f"test_{name}", values, f"of {words.seeds} seeds, beam {words.beam}")
    claims.settings["curves"] = curves


def train_best(
    world: World, settings: TrainingSettings, seed: int, device: torch.device
) -> tuple[TigerModel, list[dict[str, float]]]:
    """Train; return the checkpoint that was best in validation, and the curve."""
    torch.manual_seed(seed)
    model = TigerModel(ModelSettings(), Vocabulary(world.level_sizes)).to(device)
    everybody = np.arange(len(world.lengths_U))
    seen, lengths_U, _ = world.hold_out(HELD_OUT, everybody)
    max_history = model.settings.max_history
    examples = Examples.of(seen, lengths_U, world.user_hash_U, max_history=max_history, seed=seed)
    some = np.random.default_rng(0).permutation(everybody)[: settings.validation_users]
    read, read_B, target_B = world.hold_out(HELD_OUT, some)
    make_ranker = partial(
        TigerRanker,
        codes_NI=world.codes_NI,
        rules=Rules(world.eligible_N),
        decoding=DecodingSettings(beam_width=VALIDATION_BEAM_WIDTH, precision=settings.precision),
    )
    validation = Validation(Histories(read, read_B, world.user_hash_U[some]), target_B, make_ranker)
    progress = Progress()
    peak = peak_operations_per_s(device, torch.bfloat16)
    log = TrainingLog(settings.log_every_steps, settings.num_steps, device, peak, [])
    fit(
        model,
        make_optimizer(model, settings),
        examples.batches(
            settings.global_batch_size,
            id_length=model.vocabulary.id_length,
            batch_tokens=BATCH_TOKENS[device.type],
        ),
        tiger_collate(model, world.codes_NI),
        settings,
        progress,
        log,
        seed=seed,
        validate=partial(validation.metrics, model, device),
    )
    with torch.no_grad():
        for name, weight in progress.best.items():
            model.get_parameter(name).copy_(weight)
    return model.eval(), progress.curve


def measure_ranking(world: World, model: TigerModel, words: Any) -> dict[str, float]:
    """Recall, NDCG and MRR at 5 and 10 over all users."""
    users = np.arange(len(world.lengths_U))[: 200 if words.small else None]
    items, lengths_B, target_B = world.hold_out(1, users)
    settings = DecodingSettings(beam_width=words.beam)
    decoder = Decoder(model, world.codes_NI, world.eligible_N, settings, words.device)
    found_BK, _ = decoder.recommend(items, lengths_B, None, 10)
    counts = evaluation.rank_counts(evaluation.ranks(found_BK, target_B), 10)
    return evaluation.metrics(counts, (5, 10))


if __name__ == "__main__":
    main()
