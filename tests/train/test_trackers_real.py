"""Real MLflow and Trackio, where installed: a run's metrics are read back with their own functions.

Both are skipped elsewhere (they are no part of the development tools): CHANGELOG.md and docs/log.md say with which
releases they ran. Each runs in a process of its own, since both read their settings when they are first imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SEND = """
import sys
from pathlib import Path
from accelerate import Accelerator
from finetune.config.schema import LoggingConfig
from finetune.train.metrics import Tracker
accelerator = Accelerator(cpu=True)
settings = {"seed": 7, "trainer": {"learning_rate": 2e-4, "max_steps": None}, "layers": [0, 1]}
tracker = Tracker(accelerator, LoggingConfig(tracker=sys.argv[1]), settings, Path(sys.argv[2]))
assert tracker._tracker is not None
for step, loss in ((1, 2.5), (2, 1.25)):
    tracker.log({"loss": loss}, step)
tracker.close()
"""
READ = {
    "mlflow": """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{sys.argv[1]}/mlflow.db")
(experiment,) = [found for found in client.search_experiments() if found.name == "gpt-oss-finetune"]
(run,) = client.search_runs([experiment.experiment_id])
history = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss"))
settings = {key: run.data.params[key] for key in ("seed", "trainer.learning_rate", "trainer.max_steps", "layers")}
print(json.dumps([run.info.run_name, run.info.status, history, settings]))
""",
    "trackio": """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("gpt-oss-finetune")
history = [(line["step"], line["loss"]) for line in SQLiteStorage.get_logs("gpt-oss-finetune", name)]
found = SQLiteStorage.get_run_config("gpt-oss-finetune", name)
settings = {key: str(found[key]) for key in ("seed", "trainer.learning_rate", "trainer.max_steps", "layers")}
print(json.dumps([name, "FINISHED", history, settings]))
""",
}


def in_process(code: str, *words: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"])
def test_sent_metrics_are_read_back(tracker: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed")
    run = tmp_path / "run-1"
    run.mkdir()
    # What an environment may say of servers must not matter: offline is the default.
    elsewhere = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "TRACKIO_SPACE_ID": "someone/elsewhere",
        "HOME": str(tmp_path),
    }
    in_process(SEND, tracker, str(run), environment=elsewhere)
    found = in_process(READ[tracker], str(run), environment=elsewhere | {"TRACKIO_DIR": str(run / "trackio")})
    name, status, history, settings = json.loads(found.splitlines()[-1])
    assert (name, status) == ("run-1", "FINISHED")
    assert history == [[1, 2.5], [2, 1.25]]
    assert float(settings["trainer.learning_rate"]) == 2e-4 and settings["seed"] == "7"
    assert settings["trainer.max_steps"] == "null" and json.loads(settings["layers"]) == [0, 1]
    assert [path for path in tmp_path.iterdir() if path.name != "run-1" and not path.name.startswith(".")] == []
