"""Measure the speed of decoding, beside Hugging Face, CTranslate2, the processor's limit and the whole scoring job.

    python jobs/benchmarks/decode.py --beauty "$TIGER_DATA/beauty" --json decode.json
    python jobs/benchmarks/decode.py --only trie,constraint

A model of the paper's size with the weights that training begins with, and 12,101 planted items. All
sides run in one process, in turns, on the same users; rates are users per second on all cores. Needs the
extra `studies`. With `--model FOLDER`, a trained model is compared in both precisions too: `model.safetensors`,
`config.json`, and `ids.npz` with codes_NI, eligible_N, and of all users item_index, lengths, target.
"""

from __future__ import annotations

import copy
import gc
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted import (
    Users,
    beauty_users,
    first,
    full_users,
    planted_codes,
    planted_decoder,
    planted_model,
)
from results import Claims, chosen_parts, parser_of, run_parts
from turns import CORES, DTYPES, FASTEST, ROUNDS, alternate, fastest, ratios

from tiger_ray.core.memory import keep_freed_memory
from tiger_ray.decoding.decoder import Decoder
from tiger_ray.decoding.trie import Trie
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import pad_histories
from tiger_ray.settings.decoding import DecodingSettings

MANY = 10_000_000
# inter_threads and batch size; one translator of two threads and batches by tokens were slower
CTRANSLATE2_SETTINGS = ((CORES, 4), (CORES, 8), (CORES, 16), (CORES, 32))


def main() -> None:
    parts = {
        "hugging_face": measure_hugging_face,
        "ctranslate2": measure_ctranslate2,
        "peak": measure_peak,
        "precision": measure_precision,
        "latency": measure_latency,
        "constraint": measure_constraint,
        "trie": measure_trie,
        "job": measure_job,
    }
    parser = parser_of(__doc__, parts)
    parser.add_argument("--model", type=Path, help="folder of a trained model, for the part precision")
    words = parser.parse_args()
    chosen = chosen_parts(parser, words, parts)
    keep_freed_memory()  # before any thread allocates memory, as in a worker of the job
    torch.set_num_threads(CORES)
    claims = Claims()
    claims.settings |= {"rounds": ROUNDS, "threads": CORES, "torch": torch.__config__.show()}
    run_parts(chosen, parts, claims, words, words.json)


def recommend(decoder: Decoder, users: Users) -> Callable[[], Any]:
    """A function that recommends a full beam of items to all these users."""
    return lambda: decoder.recommend(*users, None, decoder.settings.beam_width)


def tokens_of(users: Users) -> list[torch.Tensor]:
    """Token ids of each history."""
    items, lengths_B = users
    item_tokens_NI = planted_model().vocabulary.item_tokens(planted_codes())
    history_BT = pad_histories(item_tokens_NI[items], torch.from_numpy(lengths_B), None)
    width = item_tokens_NI.shape[1]
    return [row[: length * width] for row, length in zip(history_BT, lengths_B, strict=True)]


def names_of(users: Users) -> list[list[str]]:
    """Tokens of each history as CTranslate2 takes them."""
    return [list(map(str, row.tolist())) for row in tokens_of(users)]


# Other libraries


def measure_hugging_face(claims: Claims, _: Any) -> None:
    from rivals import HuggingFace

    for beam_width, num_theirs, num_ours, target in ((10, 64, 512, ">= 20"), (50, 16, 128, ">= 40")):
        users = full_users(num_ours)
        history_BT = torch.stack(tokens_of(first(users, num_theirs)))
        ours = {precision: planted_decoder(beam_width, precision) for precision in DTYPES}
        sides = {f"ours_{name}": (num_ours, recommend(decoder, users)) for name, decoder in ours.items()}
        for precision in DTYPES:
            rivals = [
                HuggingFace(planted_model(), planted_codes(), precision, size) for size in (2, 4, 8, 16, 32)
            ]
            if precision == "fp32":
                found_BW, score_BW = recommend(ours["fp32"], first(users, num_theirs))()
                expected_BW, expected_score_BW = rivals[-1].recommend(history_BT, beam_width)
                np.testing.assert_array_equal(found_BW, expected_BW)
                np.testing.assert_allclose(score_BW, expected_score_BW, atol=1e-4)
            best = fastest({rival: partial(rival.recommend, history_BT, beam_width) for rival in rivals})
            claims.settings[f"hf_{precision}_beam{beam_width}"] = best.settings
            sides[f"theirs_{precision}"] = (num_theirs, partial(best.recommend, history_BT, beam_width))
        add_ratios(claims, "hf", f"beam{beam_width}", alternate(sides), target)


def measure_ctranslate2(claims: Claims, words: Any) -> None:
    from rivals import CTranslate2, convert

    with tempfile.TemporaryDirectory() as folder:
        convert(planted_model(), folder)
        rivals = {
            kind: [CTranslate2(planted_model(), folder, kind, *how) for how in CTRANSLATE2_SETTINGS]
            for kind in ("fp32", "int8")
        }
    exact_BWI = require_right(rivals["fp32"][0])
    rounded_BWI, _ = rivals["int8"][0].write(names_of(full_users(len(exact_BWI))), 10)
    same = (exact_BWI[:, :, None] == rounded_BWI[:, None]).all(axis=3).any(axis=2)
    claims.add("ct2_int8_overlap_10", float(same.mean()), "of the best ten of its float32")
    worlds = (("", full_users(512), ">= 2"), ("beauty_", beauty_users(1024, words.beauty), ">= 3"))
    for world, all_users, target in worlds:
        for beam_width in (10, 50):
            count = len(all_users[1]) * 10 // beam_width
            users = first(all_users, count)
            histories = names_of(users)
            sides = {}
            for precision in DTYPES:
                sides[f"ours_{precision}"] = (count, recommend(planted_decoder(beam_width, precision), users))
            for kind in rivals:
                best = fastest({rival: partial(rival.write, histories, beam_width) for rival in rivals[kind]})
                claims.settings[f"ct2_{kind}_{world}beam{beam_width}"] = best.settings
                sides[f"theirs_{kind}"] = (count, partial(best.write, histories, beam_width))
            add_ratios(claims, "ct2", f"{world}beam{beam_width}", alternate(sides), target)


def require_right(rival: Any) -> np.ndarray:
    """Require tokens and scores of CTranslate2 to equal those of Hugging Face without a constraint; return the tokens."""
    from rivals import HuggingFace

    users = full_users(32)
    token_BWI, score_BW = rival.write(names_of(users), 10)
    hugging_face = HuggingFace(planted_model(), planted_codes(), "fp32", batch_size=32)
    expected = next(hugging_face.write(torch.stack(tokens_of(users)), 10, constrained=False))
    np.testing.assert_array_equal(token_BWI, expected[0])
    np.testing.assert_allclose(score_BW, expected[1], atol=1e-4)
    return token_BWI


def add_ratios(claims: Claims, rival: str, suffix: str, rates: dict[str, list[float]], target: str) -> None:
    """Add our fp32 rate over theirs, and our best rate over their best rate."""
    for side, rate in rates.items():
        claims.add(f"{rival}_users_per_s_{suffix}_{side}", rate, "users/s")
    ours, theirs = (
        max((rate for side, rate in rates.items() if side.startswith(name)), key=np.median)
        for name in ("ours", "theirs")
    )
    same = ratios(rates["ours_fp32"], rates["theirs_fp32"])
    claims.add(f"{rival}_ratio_{suffix}_fp32", same, "times, both in fp32")
    claims.add(f"{rival}_ratio_{suffix}", ratios(ours, theirs), "times, both at their best", target)


# The processor's limit


def measure_peak(claims: Claims, _: Any) -> None:
    shapes = ((2048, 2048, 2048), (4096, 4096, 4096), (8192, 1024, 1024), (16384, 1024, 128))
    for beam_width, count in ((10, 512), (50, 128)):
        sides = {"decoder": (count, recommend(planted_decoder(beam_width, FASTEST), full_users(count)))}
        for rows, inner, columns in shapes:
            left, right = (torch.randn(of).to(DTYPES[FASTEST]) for of in ((rows, inner), (inner, columns)))
            sides[f"{rows}x{inner}x{columns}"] = (
                2 * rows * inner * columns,
                lambda left=left, right=right: torch.mm(left, right),
            )
        rates = alternate(sides)
        users_per_s = rates.pop("decoder")
        peak = max(float(np.median(rate)) for rate in rates.values())
        model = planted_model()
        operations = operations_per_user(model, 4 * model.settings.max_history, beam_width)
        claims.add(
            f"{FASTEST}_operations_per_s_beside_beam{beam_width}", peak / 1e9, "G/s, best of the shapes"
        )
        claims.add(f"operations_per_user_beam{beam_width}", operations / 1e9, "G")
        target = ">= 0.6" if beam_width == 10 else ""
        shares = [operations * rate / peak for rate in users_per_s]
        claims.add(f"peak_share_beam{beam_width}", shares, "of the rate of matrix products", target)


def operations_per_user(model: TigerModel, history_tokens: int, beam_width: int) -> float:
    """Multiplications and additions that the model needs without shortcuts of an implementation.

    Encoder over the history; keys and values of the history once per layer; then one token at the first
    level and one per beam at each other, with logits of the whole vocabulary.
    """
    sizes, id_length = model.settings, model.vocabulary.id_length
    projection = sizes.d_model * sizes.num_heads * sizes.d_kv
    feed_forward = 2 * sizes.d_model * sizes.d_ff
    read = 2 * sizes.num_heads * sizes.d_kv  # per key: its score and its share of the values
    encoder = history_tokens * (4 * projection + history_tokens * read + feed_forward)
    memory = history_tokens * 2 * projection
    written = 0.0
    for level in range(id_length):
        token = 6 * projection + (level + 1 + history_tokens) * read + feed_forward
        logits = sizes.d_model * model.vocabulary.size
        written += (1 if level == 0 else beam_width) * (sizes.num_layers * token + logits)
    return 2 * (sizes.num_layers * (encoder + memory) + written)


# Precision


def measure_precision(claims: Claims, words: Any) -> None:
    if "bf16" not in DTYPES:
        print("precision: this processor has no bf16 instructions, so there is nothing to compare")
        return
    found = {}
    for precision in DTYPES:
        found[precision], _ = planted_decoder(20, precision).recommend(*beauty_users(2000), None, 10)
    claims.add("bf16_overlap_10", overlap(found["fp32"], found["bf16"]), "of the best ten", ">= 0.98")
    if words.model is not None:
        measure_trained(claims, words.model)


def measure_trained(claims: Claims, folder: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    ids, found = np.load(folder / "ids.npz"), {}
    for precision in DTYPES:
        settings = DecodingSettings(beam_width=20, precision=precision)
        decoder = Decoder(TigerModel.from_files(files), ids["codes_NI"], ids["eligible_N"], settings)
        found[precision], _ = decoder.recommend(ids["item_index"], ids["lengths"], None, 10)
        recall = float((found[precision] == ids["target"][:, None]).any(axis=1).mean())
        claims.add(f"{precision}_recall_10_beauty", recall, "of users", "within 0.0005 of each other")
    claims.add("bf16_overlap_10_beauty", overlap(found["fp32"], found["bf16"]), "of the best ten", ">= 0.98")


def overlap(one_BK: np.ndarray, other_BK: np.ndarray) -> float:
    """Mean share of a user's items that are in both lists."""
    return float((one_BK[:, :, None] == other_BK[:, None, :]).any(axis=2).mean())


# One user at a time


def measure_latency(claims: Claims, _: Any, requests: int = 100) -> None:
    items, lengths_B = full_users(requests + 10)
    history_BL = items.reshape(len(lengths_B), -1)
    for codebook_size in (64, 256, 1024):
        for beam_width in (10, 20, 50, 100):
            decoder = planted_decoder(beam_width, FASTEST, codebook_size=codebook_size)
            seconds = []
            for history in history_BL:
                start = time.perf_counter()
                decoder.recommend(history, lengths_B[:1], None, 10)
                seconds.append(time.perf_counter() - start)
            for percent in (50, 99):
                name = f"latency_p{percent}_beam{beam_width}_codebook{codebook_size}"
                claims.add(name, 1000 * float(np.percentile(seconds[10:], percent)), f"ms, {FASTEST}")


# The constraint


def measure_constraint(claims: Claims, _: Any) -> None:
    for name, num_items, target in (("12k", planted_codes().shape[0], "<= 0.02"), ("10m", MANY, "<= 0.05")):
        for beam_width, count in ((10, 512), (50, 128)):
            decoder = planted_decoder(beam_width, FASTEST, num_items)
            users = full_users(count, num_items)
            sides = {"free": (count, recommend(unmasked_decoder(decoder), users))}
            rates = alternate(sides | {"trie": (count, recommend(decoder, users))}, rounds=9)
            overheads = [ratio - 1 for ratio in ratios(rates["free"], rates["trie"])]
            suffix = "" if beam_width == 10 else f"_beam{beam_width}"
            claims.add(f"constraint_overhead_{name}{suffix}", overheads, "of the time without it", target)


def unmasked_decoder(decoder: Decoder) -> Decoder:
    """The same decoder with every codeword allowed everywhere; so its results need not be items."""
    free = copy.copy(decoder)
    free.trie = EveryPath(decoder.model.vocabulary.level_sizes)
    return free


class EveryPath:
    """A trie of all possible Semantic IDs, with the attributes that beam search reads."""

    def __init__(self, level_sizes: tuple[int, ...]) -> None:
        self.edges = [EveryEdge(size, math.prod(level_sizes[: n + 1])) for n, size in enumerate(level_sizes)]
        self.item_index = self

    def __getitem__(self, node_BW: torch.Tensor) -> torch.Tensor:
        return node_BW


@dataclass(frozen=True)
class EveryEdge:
    num_candidates: int
    num_children: int

    def candidates(self, node_BW: torch.Tensor, log_prob_BWC: torch.Tensor) -> torch.Tensor:
        return log_prob_BWC

    def follow(self, node_BW: torch.Tensor, nth_BW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return node_BW * self.num_candidates + nth_BW, nth_BW


# The trie


def measure_trie(claims: Claims, _: Any, repeats: int = 3) -> None:
    codes_NI = planted_codes(MANY)
    in_order = codes_NI[np.lexsort(codes_NI.T[::-1])]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("", in_order), ("_unsorted", codes_NI)):
            np.save(f"{folder}/codes.npy", rows)
            built = [in_fresh_process(build_trie, f"{folder}/codes.npy") for _ in range(repeats)]
            seconds, peaks, sizes = map(list, zip(*built, strict=True))
            of_sorted = not name
            claims.add(f"trie_build_seconds_10m{name}", seconds, "s", "<= 3.5" if of_sorted else "")
            unit = "bytes beyond the code table (VmHWM)"
            claims.add(f"trie_peak_bytes_10m{name}", peaks, unit, "<= 1.4e9" if of_sorted else "")
        claims.add("trie_bytes_per_item_10m", [size / MANY for size in sizes], "bytes", "<= 12")


def build_trie(file: str) -> tuple[float, int, int]:
    """Build a trie; return seconds, peak memory beyond that of the codes, and bytes of the trie."""
    torch.set_num_threads(CORES)
    codes_NI = np.load(file)
    eligible_N = np.ones(len(codes_NI), bool)
    Trie.build(codes_NI[:1000], eligible_N[:1000])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    before, start = memory_bytes("VmRSS"), time.perf_counter()
    trie = Trie.build(codes_NI, eligible_N)
    return time.perf_counter() - start, memory_bytes("VmHWM") - before, stored_bytes(trie)


def memory_bytes(field: str) -> int:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def stored_bytes(thing: Any) -> int:
    """Bytes of all arrays inside an object; memory that arrays share counts once."""

    def buffers(value: Any) -> Iterator[tuple[int, int]]:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
        elif isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            yield value.ctypes.data, value.nbytes
        elif is_dataclass(value):
            yield from buffers(list(vars(value).values()))
        elif isinstance(value, list | tuple):
            for part in value:
                yield from buffers(part)

    return sum(dict(buffers(thing)).values())


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


# The job


def measure_job(claims: Claims, words: Any) -> None:
    """Run the scoring stage three times; before and after each run, run bare decoders with one thread per core."""
    from scoring import bare_users_per_s, job_users_per_s

    users = beauty_users(20_000, words.beauty)
    bare, stages, steady = [bare_users_per_s(users)], [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as root:
            for rates, rate in zip((stages, steady), job_users_per_s(root, users), strict=True):
                rates.append(rate)
        bare.append(bare_users_per_s(users))
    claims.add("bare_decoder_users_per_s", bare, f"users/s of {CORES} processes of one thread")
    claims.add("job_users_per_s", stages, "users/s of the whole stage")
    claims.add("job_users_per_s_without_start", steady, "users/s once every worker has finished a shard")
    beside = [(before + after) / 2 for before, after in pairwise(bare)]
    claims.add(
        "ray_share_of_bare_decoder", ratios(stages, beside), "of the bare decoders, with the start of Ray"
    )
    claims.add("ray_share_without_start", ratios(steady, beside), "of the bare decoders", ">= 0.9")


if __name__ == "__main__":
    main()
