"""The results file: what was measured, where, and how; added to and never overwritten."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepcost.case import Case

FOLDER = Path(__file__).parents[1] / "results" / "step_cost"
PACKAGES = ("torch", "higher", "betty-ml", "torchopt", "numpy")


class Results:
    """One JSON file: settings of the run, and for every case its rows.

    Raises:
        ValueError: the file was written under other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps({**settings, **environment(settings["device"])}))
        self.data: dict[str, Any] = {"settings": settings, "commands": [], "cases": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            held = self.data["settings"]
            differing = sorted(k for k in {*held, *settings} if held.get(k) != settings.get(k))
            if differing:
                raise ValueError(
                    f"{path} was measured with another {', '.join(differing)}, expected the same "
                    "to add to it: choose another --out."
                )

    def rows(self, case: Case) -> dict[str, dict[str, Any]]:
        """The rows of a case by name, to be filled in."""
        wanted = asdict(case)
        for held in self.data["cases"]:
            if held["case"] == wanted:
                return held["rows"]
        self.data["cases"].append({"case": wanted, "rows": {}})
        return self.data["cases"][-1]["rows"]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def environment(device: str) -> dict[str, Any]:
    """Versions and machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    versions["python"] = platform.python_version()
    return {"versions": versions, "machine": _machine(device)}


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
