"""What is shown of a run is what happened, and no sink that is missing goes unsaid."""

import logging
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tiger_ray.errors import SettingsError, TigerError
from tiger_ray.training import log as training_log
from tiger_ray.training.log import LossWindow, MLflow, TensorBoard, TrainingLog

CPU = torch.device("cpu")


def test_a_window_is_the_mean_over_the_losses_of_batches_of_any_size():
    window = LossWindow(torch.device("cpu"))
    window.add(0, torch.full((3, 4), 2.0))
    window.add(1, torch.full((1, 4), 6.0))
    assert window.mean() == pytest.approx((3 * 2 + 6) / 4)
    window.add(2, torch.full((2, 4), 5.0))
    assert window.mean() == pytest.approx(5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_was_not_finite_is_named(bad):
    window = LossWindow(torch.device("cpu"))
    for step, loss in enumerate((1.0, bad, bad, 1.0), start=10):
        window.add(step, torch.full((2, 3), loss))
    with pytest.raises(TigerError, match=r"not a finite number at step 12;"):
        window.mean()


def test_lines_count_examples_tokens_and_padding_of_their_steps(caplog):
    caplog.set_level(logging.INFO)
    seen = []
    log = TrainingLog(2, 3, CPU, peak=1e12, sinks=[lambda step, values: seen.append((step, values))])
    for step in range(3):
        log.add_batch(step, torch.full((2, 3), float(step)), tokens=11, padded=14, operations=5e8)
        with log.pause():
            time.sleep(0.02)
        log.end_step(step, 0.5)
    (first, one), (second, two) = seen
    assert (first, second) == (2, 3)
    assert one["training/loss"] == pytest.approx(0.5)
    assert two["training/loss"] == pytest.approx(2.0)
    assert one["training/padding_share"] == pytest.approx(3 / 14)
    assert one["training/learning_rate"] == 0.5
    assert one["training/tokens_per_s"] / one["training/examples_per_s"] == pytest.approx(11 / 2)
    assert one["training/operations_per_s"] / one["training/examples_per_s"] == pytest.approx(5e8 / 2)
    assert one["training/peak_share"] == pytest.approx(one["training/operations_per_s"] / 1e12)
    lines = caplog.messages
    assert lines[0].startswith("step 2/3  loss 0.5000  learning rate 5.0e-01  ")
    assert "padding 21%" in lines[0]


def test_pauses_do_not_count_as_training(monkeypatch):
    clock = iter([0.0, 1.0, 101.0, 104.0, 104.0])  # begin, pause, its end, end of the step, begin of the next
    monkeypatch.setattr(training_log, "time", SimpleNamespace(monotonic=clock.__next__))
    seen = []
    log = TrainingLog(1, 9, CPU, sinks=[lambda step, values: seen.append(values)])
    with log.pause():
        pass
    log.add_batch(0, torch.ones(2, 3), tokens=8, padded=8, operations=1.0)
    log.end_step(0, 0.1)
    assert seen[0]["training/examples_per_s"] == 2 / 4


def test_tensorboard_files_hold_the_numbers_of_each_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(start=40)
    board(41, {"training/loss": 2.5, "training/learning_rate": 0.25})
    board(42, {"training/loss": 1.5})
    ((name, data),) = board.files().items()
    assert name.endswith(".from-step-40")
    (tmp_path / name).write_bytes(data)  # before the writer is closed, as at a checkpoint
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert {
        tag: [(point.step, point.value) for point in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]
    } == {
        "training/loss": [(41, 2.5), (42, 1.5)],
        "training/learning_rate": [(41, 0.25)],
    }


def test_mlflow_asked_for_but_not_installed_is_a_settings_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(SettingsError, match=r"MLFLOW_TRACKING_URI is set, but .* mlflow-skinny"):
        MLflow("name", {})
