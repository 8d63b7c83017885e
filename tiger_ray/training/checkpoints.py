"""What a training run needs to go on exactly where it was: weights, optimizer, progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import safetensors.torch
import torch
from torch import Tensor, nn

from tiger_ray.errors import ArtifactError

JUDGED_BY = "ndcg@10"
"""The validation metric that decides which checkpoint becomes the model."""


STATE_FILE = "state.safetensors"
"""Name of a checkpoint on storage: one object, so that writing it again replaces all of it or nothing."""


@dataclass
class Progress:
    """How far a run has come. The order of examples and dropout follow from the step, so it says all."""

    step: int = 0
    """Optimizer steps done."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One point per checkpoint: step, loss since the last one, and validation metrics if there are any."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the checkpoint that did best in validation; empty without validation."""

    def add(self, step: int, loss: float, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Note a checkpoint, and its weights if they did better than any before."""
        before = max((point[JUDGED_BY] for point in self.curve if JUDGED_BY in point), default=-1.0)
        self.step = step
        self.curve.append({"step": step, "loss": loss, **metrics})
        if metrics and metrics[JUDGED_BY] > before:
            self.best = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @property
    def chosen(self) -> dict[str, float]:
        """The point of the curve whose weights become the model: the best one, or the last without validation."""
        if self.best:
            return max(self.curve, key=lambda point: point[JUDGED_BY])
        return self.curve[-1]

    def is_stale(self, patience: int | None) -> bool:
        """Have the last `patience` checkpoints brought nothing better? Never where it is None."""
        if patience is None or not self.best:
            return False
        return self.curve.index(self.chosen) < len(self.curve) - patience


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> bytes:
    """Everything a resumed run needs, as a safetensors file with the curve in its header."""
    tensors = {f"best.{name}": weight for name, weight in progress.best.items()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    state = {"step": progress.step, "curve": progress.curve}
    return safetensors.torch.save(tensors, metadata={"progress": json.dumps(state)})


def load_state(data: bytes, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a saved state into model and optimizer.

    Raises:
        ArtifactError: the state is damaged, or of another model.
    """
    try:
        tensors = safetensors.torch.load(data)
        # the format: length of the header in 8 bytes, then the header, of which torch.load shows no metadata
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        state = json.loads(header["__metadata__"]["progress"])
        progress = Progress(int(state["step"]), list(state["curve"]))
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"the checkpoint is damaged: {error!r}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            saved = tensors.get(f"model.{name}")
            if saved is None or saved.shape != parameter.shape:
                found = "is missing" if saved is None else f"has shape {tuple(saved.shape)}"
                raise ArtifactError(
                    f"checkpoint tensor {name} {found}; this model wants {tuple(parameter.shape)}"
                )
            parameter.copy_(saved)
            prefix = f"optimizer.{name}."
            slots = {
                key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
            }
            # Only a fused optimizer reads the step count on the device; others would wait for it there.
            here = set() if optimizer.defaults.get("fused") else {"step"}
            optimizer.state[parameter] = {
                key: value if key in here else value.to(parameter.device) for key, value in slots.items()
            }
            if f"best.{name}" in tensors:
                progress.best[name] = tensors[f"best.{name}"].to(parameter.device)
    return progress
