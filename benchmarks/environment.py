"""What a result was measured on; ``python environment.py`` prints it as JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "cffi",
    "megatron-core",
    "nvidia-cublas",
    "flashoptim",
    "pytest",
)


def commit() -> str:
    """``FORGE_COMMIT``, else git's; ``-dirty`` marks a working tree that differs from it."""
    named = os.environ.get("FORGE_COMMIT")
    if named:
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _forge_version() -> str | None:
    try:
        import forge_train
    except Exception:  # without it, too, one wants to know the rest
        return None
    return forge_train.version()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """Device, driver, versions, commit and date."""
    import torch

    versions = _package_versions()
    versions["cuda"] = str(torch.version.cuda)
    forge = _forge_version()
    if forge:
        versions["forge"] = forge
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or "CPU",
        "driver": _driver() if gpu else None,
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
    }


def slug(device: str) -> str:
    """A device's name as a folder's: ``NVIDIA H200`` is ``h200``."""
    words = device.lower().replace("nvidia", "").split()
    return "-".join(words) or "unknown"


def write_json(path: Path, value: Any) -> None:
    """Write it whole or not at all, so that a run that is cut off leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".incomplete")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(path)


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
