"""The state of a training run, from which it resumes exactly: weights, optimizer, progress."""

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
"""Name of a checkpoint on storage. It is one object, so that a write replaces all of the state or nothing."""


@dataclass
class Progress:
    """Progress of a run. The order of examples and dropout follow from the step, so no other state exists.

    >>> progress, model = Progress(), nn.Linear(2, 1)
    >>> for step, ndcg in ((10, 0.2), (20, 0.3), (30, 0.1)):
    ...     progress.add(step, 1.0, {"ndcg@10": ndcg}, model)
    >>> progress.chosen["step"], progress.is_stale(1), progress.is_stale(2)
    (20, True, False)
    """

    step: int = 0
    """Number of finished optimizer steps."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One point per checkpoint: step, mean loss since the previous checkpoint, and metrics of the validation."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the checkpoint with the best validation; empty without validation."""

    def add(self, step: int, loss: float, metrics: Mapping[str, float], model: nn.Module) -> None:
        """Add a checkpoint to the curve, and keep its weights if its validation is the best so far.

        Args:
            step: number of finished optimizer steps.
            loss: mean natural log loss since the previous checkpoint.
            metrics: of the validation; empty without validation.
            model: the model with the weights of this checkpoint.
        """
        before = max((point[JUDGED_BY] for point in self.curve if JUDGED_BY in point), default=-1.0)
        self.step = step
        self.curve.append({"step": step, "loss": loss, **metrics})
        if metrics and metrics[JUDGED_BY] > before:
            self.best = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    @property
    def chosen(self) -> dict[str, float]:
        """The point of the curve whose weights become the model: the best, or the last without validation."""
        if self.best:
            return max(self.curve, key=lambda point: point[JUDGED_BY])
        return self.curve[-1]

    def is_stale(self, patience: int | None) -> bool:
        """True if the last `patience` checkpoints are no better than the best before; False for None."""
        if patience is None or not self.best:
            return False
        return self.curve.index(self.chosen) < len(self.curve) - patience


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> bytes:
    """The state as a safetensors file, with step and curve in its header.

    Args:
        model: its named parameters are saved.
        optimizer: over the parameters of the model; its moments and step counts are saved.
        progress: of the run.
    """
    tensors = {f"best.{name}": weight for name, weight in progress.best.items()}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    state = {"step": progress.step, "curve": progress.curve}
    return safetensors.torch.save(tensors, metadata={"progress": json.dumps(state)})


def load_state(data: bytes, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Copy a saved state into model and optimizer.

    Args:
        data: result of `save_state`.
        model: of the same shape as the saved model; changed.
        optimizer: over the parameters of the model; changed.

    Returns:
        The progress of the saved run.

    Raises:
        ArtifactError: the state is damaged, or belongs to another model.
    """
    try:
        tensors = safetensors.torch.load(data)
        # Parse the header here, because safetensors.torch.load gives no metadata: 8 bytes of length, then JSON.
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
            # Only a fused optimizer reads the step count on the device; in others this would force a sync.
            here = set() if optimizer.defaults.get("fused") else {"step"}
            optimizer.state[parameter] = {
                key: value if key in here else value.to(parameter.device) for key, value in slots.items()
            }
            if f"best.{name}" in tensors:
                progress.best[name] = tensors[f"best.{name}"].to(parameter.device)
    return progress
