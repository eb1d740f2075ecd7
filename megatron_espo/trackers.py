"""Weights & Biases and MLflow, where installed and asked for (``run.trackers``): the same metrics under the same names."""

import importlib
import importlib.util
from typing import Any, Protocol

from megatron_espo.config import Config
from megatron_espo.errors import InputError


class Tracker(Protocol):
    """One more place where a step's numbers go."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Send all of ``metrics`` at ``step``."""

    def close(self) -> None:
        """End the run there."""


class WandbTracker:
    """One run of Weights & Biases; project, entity and mode come from its own environment variables."""

    def __init__(self, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(name=config.run.name or config.run.dir, dir=config.run.dir, config=config.model_dump(mode="json"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """One run of MLflow; server and experiment come from its own environment variables. MLflow allows no ``@`` in names: ``_at_``."""

    def __init__(self, config: Config) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=config.run.name or config.run.dir)
        sections = config.model_dump(mode="json").items()
        self._mlflow.log_params({f"{section}.{key}": value for section, keys in sections for key, value in keys.items()})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in metrics.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Any] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def check_trackers(config: Config) -> None:
    """InputError if one of ``run.trackers`` is not installed."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"run.trackers: expected installed packages, got {name}, which is not; pip install {name}, or leave it out")


def make_trackers(config: Config) -> list[Tracker]:
    """Those of ``run.trackers``."""
    return [TRACKERS[name](config) for name in config.run.trackers]
