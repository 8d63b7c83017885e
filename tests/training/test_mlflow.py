"""What MLflow's store holds after a run, and that a run goes on without it."""

import torch

from tiger_ray.training.log import MLflow, TrainingLog


def test_mlflow_gets_settings_and_numbers(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    sink = MLflow("2026-11-24 abc", {"model": {"d_model": 8}})
    log = TrainingLog(1, 2, torch.device("cpu"), None, [sink])
    sink(1, {"training/loss": 2.5})
    log.add_checkpoint({"step": 1, "ndcg@10": 0.5})
    sink(2, {"training/loss": 1.5})
    sink.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tiger_ray").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"model.d_model": "8"}
    assert run.data.metrics["checkpoint/ndcg_10"] == 0.5
    history = client.get_metric_history(run.info.run_id, "training/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 1.5)]


def test_a_run_that_ended_by_an_error_does_not_keep_the_next_from_beginning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    for name in ("one", "two"):
        sink = MLflow(name, {"model": {"d_model": 8}})
    sink.close()
    assert "MLflow gets nothing more" not in caplog.text


def test_a_tracking_server_that_is_away_is_reported_once_and_training_goes_on(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sink = MLflow("2026-11-24 abc", {"model": {"d_model": 8}})
    sink(1, {"training/loss": 2.5})
    assert caplog.text.count("MLflow gets nothing more of this run") == 1
