"""Validation ranks the event before the last of every user of one sample, whatever the number of workers."""

import math
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tiger_ray.artifacts import schemas
from tiger_ray.artifacts.storage import Storage
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import Vocabulary
from tiger_ray.published.sequences import load_validation
from tiger_ray.rankers.base import Rules
from tiger_ray.rankers.tiger import VALIDATION_BEAM_WIDTH, TigerRanker
from tiger_ray.settings.decoding import DecodingSettings
from tiger_ray.settings.model import ModelSettings

LEVEL_SIZES = (4, 4, 3)
CODES_NI = np.random.default_rng(0).permutation(np.array(list(np.ndindex(*LEVEL_SIZES)), np.int16))[:40]
ELIGIBLE_N = np.arange(40) % 4 != 1
CPU = torch.device("cpu")
NUM_USERS = 60


def histories_of(seed=0):
    """Histories by user; some are too short to be evaluated."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, length).tolist() for length in rng.integers(0, 9, NUM_USERS)]


def hash_of(user):
    return (user * 0x9E3779B97F4A7C15 + 7) % 2**64


def written(folder, histories, num_shards=4):
    """Histories as a sequences artifact."""
    storage = Storage(str(folder))
    run = storage.begin("sequences", f"{len(list(folder.iterdir())):064x}")
    entries = []
    for shard in range(num_shards):
        users = range(shard, len(histories), num_shards)
        table = pa.table(
            [
                [str(user) for user in users],
                pa.array([hash_of(user) for user in users], pa.uint64()),
                [histories[user] for user in users],
            ],
            schema=schemas.sequences(pa.string()),
        )
        entries.append(run.write_table(f"shard-{shard:05d}.parquet", table))
    return storage, run.as_manifest(entries)


def loaded(sequences, num_users=10**6, rank=0, world_size=1):
    return load_validation(
        *sequences,
        num_users,
        partial(
            TigerRanker,
            codes_NI=CODES_NI,
            rules=Rules(ELIGIBLE_N),
            decoding=DecodingSettings(beam_width=VALIDATION_BEAM_WIDTH),
        ),
        holdout="leave_one_out",
        rank=rank,
        world_size=world_size,
    )


def users_of(*parts):
    """(hash, events read, target) of each user, sorted."""
    found = []
    for part in parts:
        found += [
            (int(user), read, int(target))
            for user, read, target in zip(
                part.histories.user_hash_B, part.histories.lists(), part.target_B, strict=True
            )
        ]
    return sorted(found)


def tiny_model(num_user_buckets=5, seed=0):
    torch.manual_seed(seed)
    settings = ModelSettings(
        num_layers=1,
        d_model=16,
        num_heads=2,
        d_kv=8,
        d_ff=24,
        max_history=4,
        num_user_buckets=num_user_buckets,
        dropout=0.5,
    )
    return TigerModel(settings, Vocabulary(LEVEL_SIZES, num_user_buckets))


def test_the_target_is_the_event_before_the_last_and_short_histories_have_none(tmp_path):
    histories = histories_of()
    assert {len(history) for history in histories} >= {0, 1, 2, 3, 8}
    expected = [
        (hash_of(user), history[:-2], history[-2])
        for user, history in enumerate(histories)
        if len(history) > 2
    ]
    assert users_of(loaded(written(tmp_path, histories))) == sorted(expected)


@pytest.mark.parametrize("num_users", [1, 2, 7, 20, 10**6])
def test_no_user_of_the_sample_is_lost_or_counted_twice_by_any_number_of_workers(tmp_path, num_users):
    sequences = written(tmp_path, histories_of())
    alone = users_of(loaded(sequences, num_users))
    enough = sum(len(history) > 2 for history in histories_of())
    assert len(alone) == min(num_users, enough)
    for world_size in (2, 3, 5):
        parts = [loaded(sequences, num_users, rank, world_size) for rank in range(world_size)]
        assert users_of(*parts) == alone
        sizes = [len(part.target_B) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_a_larger_sample_holds_the_smaller_one(tmp_path):
    sequences = written(tmp_path, histories_of())
    samples = [users_of(loaded(sequences, count)) for count in (3, 15, 30)]
    for smaller, larger in zip(samples, samples[1:], strict=False):
        assert all(user in larger for user in smaller)


def by_brute_force(model, validation):
    """Recall, NDCG and MRR at 10 from the log-probability of every eligible item, one user at a time."""
    token_NI = model.vocabulary.item_tokens(CODES_NI)
    gains, inverses = [], []
    for user, read, target in users_of(validation):
        tokens = token_NI[read[-model.settings.max_history :]].flatten()
        if model.vocabulary.num_user_buckets:
            bucket = user % model.vocabulary.num_user_buckets
            tokens = torch.cat([torch.tensor([model.vocabulary.user_offset + bucket]), tokens])
        with torch.no_grad():
            logits_NIV = model.logits(tokens.expand(len(CODES_NI), -1), token_NI)
        score_N = logits_NIV.double().log_softmax(-1).gather(-1, token_NI[..., None]).sum((1, 2))
        score_N[~torch.from_numpy(ELIGIBLE_N)] = -torch.inf
        rank = int((score_N > score_N[target]).sum()) + 1 if ELIGIBLE_N[target] else 99
        gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
        inverses.append(1 / rank if rank <= 10 else 0.0)
    recall = np.mean([gain > 0 for gain in gains])
    return {"recall@10": recall, "ndcg@10": np.mean(gains), "mrr@10": np.mean(inverses)}


@pytest.mark.parametrize("num_user_buckets", [0, 5])
def test_metrics_equal_a_ranking_of_every_item(tmp_path, num_user_buckets):
    validation = loaded(written(tmp_path, histories_of()))
    model = tiny_model(num_user_buckets)
    model.train()
    found = validation.metrics(model, CPU)
    assert model.training, "validation leaves the model as it was"
    expected = by_brute_force(model.eval(), validation)
    assert found == pytest.approx(expected, abs=1e-9)
    assert 0 < found["ndcg@10"] < found["recall@10"] < 1


def test_the_last_event_of_a_user_changes_nothing(tmp_path):
    histories = histories_of()
    other = [[*history[:-1], (history[-1] + 1) % 40] if history else [] for history in histories]
    assert histories != other
    one, two = (loaded(written(tmp_path, each)) for each in (histories, other))
    assert users_of(one) == users_of(two)
    assert one.metrics(tiny_model(), CPU) == two.metrics(tiny_model(), CPU)


SAMPLES = (2, 7, 10**6)
"""The first leaves one of three workers without a user."""


def validate_as_worker(rank, folder, sequences, nobody):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=3)
    model = tiny_model()
    found = [loaded(sequences, count, rank, 3).metrics(model, CPU) for count in SAMPLES]
    found.append(loaded(nobody, 5, rank, 3).metrics(model, CPU))
    torch.save(found, f"{folder}/found-{rank}")
    dist.destroy_process_group()


def test_three_workers_have_the_metrics_of_one_and_agree_on_them(tmp_path):
    sequences = written(tmp_path, histories_of())
    nobody = written(tmp_path, [[1, 2], [3], []] * 4)
    start_processes(validate_as_worker, (str(tmp_path), sequences, nobody), 3, start_method="forkserver")
    found = [torch.load(tmp_path / f"found-{rank}") for rank in range(3)]
    assert found[0] == found[1] == found[2]
    *counted, of_nobody = found[0]
    assert of_nobody == {}
    for count, together in zip(SAMPLES, counted, strict=True):
        assert together == pytest.approx(loaded(sequences, count).metrics(tiny_model(), CPU), abs=1e-12)
