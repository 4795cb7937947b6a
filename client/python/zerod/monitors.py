# SPDX-License-Identifier: Apache-2.0
"""Where the values of each step go: CSV files, TensorBoard, Weights & Biases. Rank 0's."""

import csv
import importlib
import importlib.util
import os
from typing import Any, Protocol


class Monitor(Protocol):
    def write(self, values: dict[str, float], samples: int) -> None:
        """`values` by name ("Train/Samples/lr") after `samples` samples of training."""

    def close(self) -> None: ...


class CsvMonitor:
    """A file for each value, a line for each step; a file that is there already is continued."""

    def __init__(self, section: dict[str, Any]) -> None:
        self.folder = os.path.join(section["output_path"], section["job_name"])
        os.makedirs(self.folder, exist_ok=True)

    def write(self, values: dict[str, float], samples: int) -> None:
        for name, value in values.items():
            path = os.path.join(self.folder, name.replace("/", "_") + ".csv")
            with open(path, "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["step", name.rpartition("/")[2]])
                writer.writerow([samples, value])

    def close(self) -> None:
        pass


class TensorBoardMonitor:
    def __init__(self, section: dict[str, Any]) -> None:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        folder = os.path.join(section["output_path"], section["job_name"])
        self._writer = tensorboard.SummaryWriter(log_dir=folder)

    def write(self, values: dict[str, float], samples: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, samples)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbMonitor:
    def __init__(self, section: dict[str, Any]) -> None:
        self._run = importlib.import_module("wandb").init(
            project=section["project"], group=section["group"], entity=section["team"]
        )

    def write(self, values: dict[str, float], samples: int) -> None:
        self._run.log(values, step=samples)

    def close(self) -> None:
        self._run.finish()


# Of each block of the configuration: the class, and the package that it needs.
_KINDS: dict[str, tuple[type[Any], str | None]] = {
    "csv_monitor": (CsvMonitor, None),
    "tensorboard": (TensorBoardMonitor, "tensorboard"),
    "wandb": (WandbMonitor, "wandb"),
}


def check(config: dict[str, Any]) -> None:
    """ValueError where a monitor is enabled whose package is not installed."""
    for name, (_, package) in _KINDS.items():
        if not config[name]["enabled"] or package is None:
            continue
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{name}.enabled needs the Python package {package}, which is not installed: "
                "install it, or leave the block out (csv_monitor needs none)"
            )


def open_all(config: dict[str, Any]) -> list[Monitor]:
    """Those that are enabled."""
    return [kind(config[name]) for name, (kind, _) in _KINDS.items() if config[name]["enabled"]]
