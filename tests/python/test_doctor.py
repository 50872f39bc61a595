"""``python -m forge_train doctor``: what it finds without a GPU, and how it says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from forge_train import doctor
from forge_train.cli import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
FINDING = re.compile(r"^(ok|note|wrong) +(FORGE|CPU|GPU|kernels for \w+) +(.*)$", re.M)


def findings(output: str) -> dict[str, tuple[str, str]]:
    """State and text by subject; a text's lines joined."""
    joined = re.sub(r"\n {20,}", " ", output)
    return {subject: (state, text) for state, subject, text in FINDING.findall(joined)}


def in_a_child(*arguments: str, **variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run it in a process that has loaded no library yet."""
    paths = [str(ROOT / "megatron_patch")] if "FORGE_LIBRARY" in os.environ else []
    paths.append(os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ, **variables, "PYTHONPATH": os.pathsep.join(path for path in paths if path)
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-m", "forge_train", "doctor", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    return child.returncode, findings(child.stdout)


def test_a_machine_without_a_gpu_works_and_says_what_it_lacks(tmp_path, capsys):
    assert main(["doctor", "--cache-dir", str(tmp_path / "cache")]) == 0
    output = capsys.readouterr().out
    found = findings(output)
    assert found["FORGE"][0] == "ok" and torch.__version__ in found["FORGE"][1]
    assert found["CPU"][0] == "ok" and "torch's in fp64" in found["CPU"][1]
    assert found["GPU"][0] == "note" and "driver" in found["GPU"][1]
    state, text = found["kernels for sm_80"]
    files = list((tmp_path / "cache").glob("*.cubin"))
    assert state == "ok" and f"{len(files)} compiled, 0 found" in text and str(tmp_path) in text
    assert output.endswith("nothing is wrong\n")
    assert main(["doctor", "--cache-dir", str(tmp_path / "cache")]) == 0
    assert f"0 compiled, {len(files)} found" in capsys.readouterr().out


def test_a_gpu_that_was_asked_for_is_wrong(tmp_path, capsys):
    assert main(["doctor", "--device", "cuda", "--cache-dir", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert findings(output)["GPU"][0] == "wrong"
    assert output.endswith("1 wrong: see above for the way out\n")


def test_the_cpu_alone(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    assert set(findings(capsys.readouterr().out)) == {"FORGE", "CPU"}


def test_no_compiler(tmp_path):
    variables = {"FORGE_NVRTC": str(tmp_path / "libnvrtc.so"), "FORGE_CACHE_DIR": str(tmp_path)}
    status, found = in_a_child(**variables)
    state, text = found["kernels for sm_80"]
    assert (status, state) == (0, "note") and "libnvrtc.so" in text and "FORGE_NVRTC" in text
    # For a run that asked for a GPU it is no note.
    status, found = in_a_child("--device", "cuda", **variables)
    assert (status, found["kernels for sm_80"][0]) == (1, "wrong")


def test_a_cache_that_others_can_write(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    status, found = in_a_child("--device", "cuda", FORGE_CACHE_DIR=str(folder))
    state, text = found["kernels for sm_80"]
    assert (status, state) == (1, "wrong") and str(folder) in text and "chmod" in text


def test_a_result_that_is_off_is_wrong(monkeypatch, capsys):
    def off(*_: object) -> float:
        return 0.5

    monkeypatch.setattr(doctor, "_worst", off)
    assert main(["doctor", "--device", "cpu"]) == 1
    state, text = findings(capsys.readouterr().out)["CPU"]
    assert state == "wrong" and "5.0e-01 of a step" in text and "report it" in text


def test_a_device_of_another_kind(capsys):
    assert main(["doctor", "--device", "mps"]) == 1
    assert "device='mps' is neither a CPU nor an NVIDIA GPU" in capsys.readouterr().err


def test_little_disk(tmp_path, monkeypatch, capsys):
    class Usage:
        free = 1 << 20

    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage)
    arguments = ["doctor", "--device", "cuda", "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 1
    state, text = findings(capsys.readouterr().out)["kernels for sm_80"]
    assert state == "wrong" and "1 MiB of disk are left" in text and "FORGE_CACHE_DIR" in text
