"""Measure the speed of training: beside Hugging Face, two workers beside two threads, padding, and share of the peak.

    python jobs/benchmarks/train.py --beauty "$TIGER_DATA/beauty" --json train.json
    python jobs/benchmarks/train.py --only padding,peak

A model of the paper's size with the weights that training begins with, histories as long as Amazon Beauty's
of planted items, Adafactor, global batches of 256. All sides run in turns on the same examples; rates are examples
per second on all cores, of one process with all threads or of DDP workers with one thread each: the better of the
two for every side. Needs the extra `studies`.
"""

from __future__ import annotations

import io
import multiprocessing
import socket
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from planted import beauty_examples, planted_codes, planted_model
from results import Claims, chosen_parts, parser_of, run_parts
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from turns import CORES, DTYPES, FASTEST, ROUNDS, alternate, fastest, ratios

from tiger_ray.core.logs import show_logs
from tiger_ray.core.memory import keep_freed_memory
from tiger_ray.model.t5 import TigerModel
from tiger_ray.model.tokens import PAD
from tiger_ray.settings.training import TrainingSettings
from tiger_ray.training.checkpoints import Progress
from tiger_ray.training.collate import tiger_collate, tokens_of
from tiger_ray.training.examples import BATCHES_PER_GROUP, Batch
from tiger_ray.training.log import TrainingLog, peak_operations_per_s
from tiger_ray.training.loop import BATCH_TOKENS, fit, learning_rate, make_optimizer

GLOBAL_BATCH = 256
PADDED = 81  # 20 items of 4 codewords, and a user token or an end, as other implementations have it
EVERY = 8  # of the batches that are sorted by length together, every eighth stands for all


def main() -> None:
    show_logs(with_time=False)
    parts = {
        "hugging_face": measure_hugging_face,
        "ddp2": measure_ddp2,
        "padding": measure_padding,
        "peak": measure_peak,
    }
    parser = parser_of(__doc__, parts)
    words = parser.parse_args()
    chosen = chosen_parts(parser, words, parts)
    keep_freed_memory()  # before any thread allocates memory, as in a worker of the job
    torch.set_num_threads(CORES)
    claims = Claims()
    claims.settings |= {"rounds": ROUNDS, "threads": CORES, "torch": torch.__config__.show()}
    claims.settings |= {
        "model": planted_model().settings.model_dump(mode="json"),
        "global_batch": GLOBAL_BATCH,
        "optimizer": TrainingSettings().optimizer,
    }
    run_parts(chosen, parts, claims, Machine(words.beauty), words.json)


# Ways to train


@dataclass(frozen=True)
class Side:
    """One way to train."""

    ours: bool
    precision: str
    workers: int
    """One process with all threads, or as many as there are cores with one each."""
    padded: int | None = None
    """Tokens that every history is padded to; None: the longest of its batch."""
    attention: str = ""
    """Hugging Face's kind of attention."""


class Machine:
    """Runs sides in this process, or in workers that wait at their pipes for the next side."""

    def __init__(self, beauty: Path | None) -> None:
        self.beauty = beauty
        self._here = Worker(beauty)
        self._pipes: list[Connection] = []

    def run(self, side: Side, num_steps: int = BATCHES_PER_GROUP // EVERY) -> dict[str, float]:
        """Train for some steps, in order of length; return the values of the training log, if the side is ours."""
        seen, *_ = self._ask(side.workers, "run", side, num_steps)
        return seen

    def peak(self, side: Side) -> float:
        """Operations per second of matrix products on all workers at once."""
        return sum(self._ask(side.workers, "peak", side))

    def work(
        self, side: Side, num_steps: int = BATCHES_PER_GROUP // EVERY
    ) -> tuple[float, Callable[[], Any]]:
        """A side of `alternate`: number of examples, and a function that trains on them."""
        return num_steps * GLOBAL_BATCH, partial(self.run, side, num_steps)

    def _ask(self, workers: int, method: str, *arguments: Any) -> list[Any]:
        """Call a method on each worker and return the answers."""
        if workers == 1:
            return [getattr(self._here, method)(*arguments)]
        self._start_workers()
        for pipe in self._pipes:
            pipe.send((method, *arguments))
        return [pipe.recv() for pipe in self._pipes]

    def _start_workers(self) -> None:
        if self._pipes:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        context = multiprocessing.get_context("spawn")
        for rank in range(CORES):
            here, there = context.Pipe()
            arguments = (there, self.beauty, address, rank)
            context.Process(target=serve, args=arguments, daemon=True).start()
            there.close()
            self._pipes.append(here)


def serve(pipe: Connection, beauty: Path | None, address: str, rank: int) -> None:
    """Run the calls from the pipe, in each DDP worker."""
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=CORES)
    worker = Worker(beauty, rank, CORES)
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        pipe.send(getattr(worker, method)(*arguments))


class Worker:
    """Trains models with this process's share of each batch; the first run of a side makes its model."""

    def __init__(self, beauty: Path | None, rank: int = 0, world_size: int = 1) -> None:
        self._rank, self._world_size = rank, world_size
        self._codes_NI = planted_codes()
        self._models: dict[Side, tuple[nn.Module, torch.optim.Optimizer]] = {}
        whole = first_group(beauty)
        order = np.argsort([sum(batch.lengths_B.sum() for batch in step) for step in whole], kind="stable")
        self._chosen = order[EVERY // 2 :: EVERY]
        self._beauty = beauty

    def run(self, side: Side, num_steps: int) -> dict[str, float]:
        if side not in self._models:
            self._models[side] = self._make(side)
        network, optimizer = self._models[side]
        group = first_group(
            self._beauty,
            rank=self._rank,
            world_size=self._world_size,
            batch_tokens=BATCH_TOKENS["cpu"] if side.ours else None,
        )
        # Take evenly spaced steps, so that fewer steps stand for all.
        thin = len(self._chosen) // num_steps
        steps = [group[number] for number in self._chosen[thin // 2 :: thin]]
        settings = settings_of(side, len(steps))
        if side.ours:
            return self._train_ours(network, optimizer, steps, settings)
        self._train_theirs(network, optimizer, [batch for (batch,) in steps], settings, side.padded)
        return {}

    def peak(self, side: Side) -> float:
        return peak_operations_per_s(torch.device("cpu"), DTYPES[side.precision])

    def _make(self, side: Side) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = fresh_model()
        network: nn.Module = model if side.ours else rival(model, side.attention).train()
        optimizer = make_optimizer(network, settings_of(side, 1))
        return (network if self._world_size == 1 else DistributedDataParallel(network)), optimizer

    def _train_ours(
        self, network: Any, optimizer: Any, steps: list[list[Batch]], settings: TrainingSettings
    ) -> dict[str, float]:
        model = network if isinstance(network, TigerModel) else network.module
        seen: dict[str, float] = {}
        device = torch.device("cpu")
        log = TrainingLog(len(steps), len(steps), device, sinks=[lambda _, values: seen.update(values)])
        with redirect_stdout(io.StringIO()):
            fit(
                network,
                optimizer,
                iter(steps),
                tiger_collate(model, self._codes_NI),
                settings,
                Progress(),
                log,
                seed=0,
                rank=self._rank,
                world_size=self._world_size,
            )
        return seen

    def _train_theirs(
        self, network: Any, optimizer: Any, steps: list[Batch], settings: TrainingSettings, padded: int | None
    ) -> None:
        """The plain loop around a model of Hugging Face."""
        for step, batch in enumerate(steps):
            history_BT, target_BI = tokens_of(batch, self._codes_NI, planted_model().vocabulary)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = loss_of_theirs(network, history_BT, target_BI, padded)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def first_group(beauty: Path | None, **share: Any) -> list[list[Batch]]:
    """The first batches that are sorted by length together, or a worker's share of them."""
    steps = beauty_examples(beauty).batches(
        GLOBAL_BATCH, id_length=planted_model().vocabulary.id_length, **share
    )
    return [next(steps) for _ in range(BATCHES_PER_GROUP)]


def settings_of(side: Side, num_steps: int) -> TrainingSettings:
    return TrainingSettings(precision=side.precision, num_steps=num_steps, global_batch_size=GLOBAL_BATCH)


def fresh_model() -> TigerModel:
    """A copy of the planted model."""
    return TigerModel.from_files(planted_model().to_files()).train()


def rival(model: TigerModel, attention: str) -> Any:
    """The same weights in `T5ForConditionalGeneration`, in evaluation mode."""
    from rivals import hugging_face

    theirs = hugging_face(model)
    theirs.set_attn_implementation(attention)
    return theirs


def loss_of_theirs(network: Any, history_BT: Tensor, target_BI: Tensor, padded: int | None) -> Tensor:
    if padded:
        history_BT = F.pad(history_BT, (0, padded - history_BT.shape[1]), value=PAD)
    mask_BT = (history_BT != PAD).long()
    return network(input_ids=history_BT, attention_mask=mask_BT, labels=target_BI, use_cache=False).loss


# Hugging Face


def measure_hugging_face(claims: Claims, machine: Machine) -> None:
    for attention in ("sdpa", "eager"):
        require_same_gradients(machine.beauty, attention)
    layouts = (1, CORES)
    sides: dict[str, tuple[float, Callable[[], Any]]] = {}
    best: dict[str, Side] = {}
    for precision in DTYPES:
        ours = [Side(True, precision, workers) for workers in layouts]
        theirs = [
            Side(False, precision, workers, PADDED, attention)
            for workers in layouts
            for attention in ("sdpa", "eager")
        ]
        for name, candidates, num_steps in (("ours", ours, 8), ("theirs", theirs, 2)):
            side = fastest({side: partial(machine.run, side, num_steps // 2) for side in candidates})
            best[f"{name}_{precision}"] = side
            claims.settings[f"{name}_{precision}"] = {"workers": side.workers, "attention": side.attention}
            sides[f"{name}_{precision}"] = machine.work(side, num_steps)
    for precision in DTYPES:
        side = replace(best[f"theirs_{precision}"], padded=None)
        sides[f"theirs_{precision}_sorted"] = machine.work(side)
    rates = alternate(sides)
    for name, rate in rates.items():
        claims.add(f"hf_examples_per_s_{name}", rate, "examples/s")

    def fastest_of(names: Iterable[str]) -> list[float]:
        return max((rates[name] for name in names), key=np.median)

    ours_best, theirs_best = (
        fastest_of(f"{name}_{precision}" for precision in DTYPES) for name in ("ours", "theirs")
    )
    theirs_sorted = fastest_of(f"theirs_{precision}_sorted" for precision in DTYPES)
    unit = "times, both at their best"
    claims.add(
        "hf_ratio_examples", ratios(ours_best, theirs_best), f"{unit}, theirs padded to {PADDED}", ">= 6"
    )
    claims.add(
        "hf_ratio_examples_fp32", ratios(rates["ours_fp32"], rates["theirs_fp32"]), "times, both in fp32"
    )
    if "bf16" in DTYPES:
        claims.add(
            "hf_ratio_examples_bf16", ratios(rates["ours_bf16"], rates["theirs_bf16"]), "times, both in bf16"
        )
    claims.add("hf_ratio_examples_sorted", ratios(ours_best, theirs_sorted), f"{unit}, theirs on our batches")


def require_same_gradients(beauty: Path | None, attention: str) -> None:
    """Require loss and gradients of a few examples without dropout to equal those of Hugging Face padded to 81.

    Few examples only: among many, some input of a ReLU is so close to zero that the slope depends on rounding.
    """
    (batch,) = first_group(beauty)[0]
    model = fresh_model().eval()
    theirs = rival(model, attention)
    history_BT, target_BI = (each[:8] for each in tokens_of(batch, planted_codes(), model.vocabulary))
    losses = model(history_BT, target_BI).mean(), loss_of_theirs(theirs, history_BT, target_BI, PADDED)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


# Workers


def measure_ddp2(claims: Claims, machine: Machine) -> None:
    claims.settings["ddp2_precision"] = FASTEST
    rates = alternate({workers: machine.work(Side(True, FASTEST, workers)) for workers in (1, CORES)})
    for workers, rate in rates.items():
        claims.add(
            f"ddp2_examples_per_s_{workers}_workers", rate, f"examples/s, {CORES // workers} threads each"
        )
    unit = f"times, {CORES} DDP workers over {CORES} threads"
    claims.add("ddp2_ratio", ratios(rates[CORES], rates[1]), unit, ">= 0.9")


# Padding


def measure_padding(claims: Claims, machine: Machine) -> None:
    examples, id_length = beauty_examples(machine.beauty), planted_model().vocabulary.id_length
    claims.settings["examples"] = len(examples)
    for global_batch in (GLOBAL_BATCH, 64):
        suffix = "" if global_batch == GLOBAL_BATCH else f"_batch{global_batch}"
        num_steps = -(-len(examples) // global_batch)
        for workers in (1, CORES):
            lengths = [
                batch.lengths_B
                for rank in range(workers)
                for step in islice(
                    examples.batches(
                        global_batch,
                        rank=rank,
                        world_size=workers,
                        batch_tokens=BATCH_TOKENS["cpu"],
                        id_length=id_length,
                    ),
                    num_steps,
                )
                for batch in step
            ]
            name = "padding_share" if workers == 1 else f"padding_share_{workers}_workers"
            claims.add(name + suffix, padding(lengths), "of the encoder's tokens, an epoch")
        length_N = np.random.default_rng(0).permutation(np.concatenate(lengths))
        unsorted = np.split(length_N, np.arange(global_batch, len(length_N), global_batch))
        claims.add(f"padding_share_unsorted{suffix}", padding(unsorted), "with batches at random")
    items = PADDED / id_length
    claims.add(
        f"padding_share_{PADDED}", 1 - float(length_N.mean()) / items, f"with {PADDED} tokens for each"
    )


def padding(lengths: list[np.ndarray]) -> float:
    """Share of padding in batches of histories of these lengths, in items."""
    padded = sum(len(length_B) * int(length_B.max()) for length_B in lengths)
    return 1 - sum(int(length_B.sum()) for length_B in lengths) / padded


# The processor's limit


def measure_peak(claims: Claims, machine: Machine) -> None:
    for precision in DTYPES:
        for workers in (1, CORES):
            side = Side(True, precision, workers)
            machine.run(side)
            pairs = [
                (machine.run(side)["training/operations_per_s"], machine.peak(side)) for _ in range(ROUNDS)
            ]
            suffix = "" if precision == FASTEST else f"_{precision}"
            suffix += "" if workers == 1 else f"_{workers}_workers"
            peaks = [peak / 1e9 for _, peak in pairs]
            claims.add(f"products_per_s{suffix}", peaks, "G operations/s of large matrix products")
            shares = [operations / peak for operations, peak in pairs]
            claims.add(f"peak_share{suffix}", shares, "of that rate")


if __name__ == "__main__":
    main()
