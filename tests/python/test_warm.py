"""``forge_train.warm`` and ``python -m forge_train warm``: kernels compiled without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from forge_train import AdamW, Context, ForgeArgumentError, ForgeBackendError, LinearSpec, warm
from forge_train.cli import main
from forge_train.model_shapes import shapes_of

# fp32 factors on sm_80: nine small kernels.
SMALL = ["warm", "--arch", "sm_80", "--weight-format", "fp32", "--shape", "256x128"]
SPEC = LinearSpec(256, 128, AdamW())
SUMMARY = re.compile(r"(\d+) compiled, (\d+) present, [\d.]+ s; NVRTC 1\d\.\d; (.*)")


def counts(output: str) -> tuple[int, int]:
    compiled, present, _ = SUMMARY.search(output).groups()
    return int(compiled), int(present)


def test_the_second_time_nothing_is_compiled(tmp_path, capsys):
    arguments = [*SMALL, "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "cache").glob("*.cubin"))
    assert counts(first) == (len(files), 0)
    assert len(re.findall(r"^compiled +\d+\.\d  ", first, re.M)) == len(files)
    assert "element-wise update, rule 'adamw'" in first
    assert str(tmp_path / "cache") in SUMMARY.search(first)[3]
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert counts(second) == (0, len(files))
    assert len(re.findall(r"^present  ", second, re.M)) == len(files)
    assert sorted(path.name for path in (tmp_path / "cache").glob("*.cubin")) == files


def test_shapes_that_share_kernels_compile_them_once(tmp_path, capsys):
    arguments = [*SMALL, "--shape", "512x128", "--cache-dir", str(tmp_path / "cache")]
    assert main(arguments) == 0
    assert counts(capsys.readouterr().out) == (len(list((tmp_path / "cache").glob("*.cubin"))), 0)


def test_numbers_by_value_need_fewer_kernels(tmp_path, capsys):
    arguments = [*SMALL, "--cache-dir", str(tmp_path / "cache")]
    assert main([*arguments, "--by-value"]) == 0
    first = capsys.readouterr().out
    assert "scalars of a step" not in first
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert counts(second) == (1, counts(first)[0])
    assert re.search(r"^compiled .*scalars of a step, rule 'adamw'", second, re.M)


def test_many_processes_fill_one_directory(tmp_path):
    command = [sys.executable, "-m", "forge_train", *SMALL, "--cache-dir", str(tmp_path / "cache")]
    paths = [str(ROOT / "megatron_patch")] if "FORGE_LIBRARY" in os.environ else []
    paths.append(os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    outputs = [child.communicate(timeout=240)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    files = list((tmp_path / "cache").glob("*.cubin"))
    assert {sum(counts(output)) for output in outputs} == {len(files)}
    others = [path.suffix for path in (tmp_path / "cache").iterdir() if path not in files]
    assert others == [".version"]  # and no part of a kernel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_75"], r"'sm_75' is compute capability 7\.5; the kernels need 8\.0"),
        (["--arch", "hopper"], "'hopper' is none; name one as NVRTC does: sm_80, sm_90a"),
        (["--option", "beta=1"], "--option beta: adamw has lr, betas"),
        (["--option", "eps=small"], "'small' is not a number"),
        (["--shape", "256x130", "--tp", "4"], "in_features: 130 does not divide by 4 ranks"),
        (["--model", "missing.json"], "missing.json"),
    ],
)
def test_what_is_wrong_is_named(arguments, message, tmp_path, capsys):
    assert main([*SMALL, "--cache-dir", str(tmp_path / "cache"), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_without_nvrtc_the_way_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORGE_NVRTC", str(tmp_path / "libnvrtc.so.13"))
    assert main([*SMALL, "--cache-dir", str(tmp_path / "cache")]) == 1
    message = capsys.readouterr().err
    assert "FORGE_NVRTC" in message
    assert str(tmp_path / "libnvrtc.so.13") in message
    assert "unset it" in message
    with pytest.raises(ForgeBackendError, match="FORGE_ERROR_COMPILE"):
        warm(SPEC, "sm_80", cache_dir=tmp_path / "cache")


def test_a_directory_that_others_can_write_is_an_error(tmp_path):
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(ForgeBackendError, match=r"others could write it \(chmod 700.*_CACHE\]"):
        warm(SPEC, "sm_80", cache_dir=directory)
    assert list(directory.iterdir()) == []


def test_an_exception_of_the_callback_is_raised(tmp_path):
    def stop(_kernel):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm(SPEC, "sm_80", cache_dir=tmp_path / "cache", progress=stop)


def test_a_context_of_the_cpu_has_nothing_to_compile(tmp_path):
    context = Context(threads=1)
    assert warm(SPEC, context).compiled == 0
    with pytest.raises(ForgeArgumentError, match=r"config\.cache_dir: given.*forge_warm"):
        warm(SPEC, context, cache_dir=tmp_path)


def test_the_shapes_of_a_model(tmp_path):
    path = tmp_path / "config.json"
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    path.write_text(json.dumps({**config, "num_key_value_heads": 8, "vocab_size": 128256}))
    shapes = shapes_of(path)
    for shape in [(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096)]:
        assert shape in shapes
    assert (4096, 14336) in shapes
    assert (128256, 4096) in shapes
    path.write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match=r"config\.json has no intermediate_size.*--shape"):
        shapes_of(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        shapes_of(Path(path))


def test_features_half_open_and_no_architecture_are_named():
    spec = LinearSpec(0, 0, AdamW(), factor_dtype=torch.bfloat16, weight_format="bf16+16")
    with pytest.raises(ForgeArgumentError, match="out_features, in_features: 0 and 8"):
        warm(LinearSpec(0, 8, AdamW()), "sm_80")
    with pytest.raises(ForgeArgumentError, match="'sm_1'"):
        warm(spec, "sm_1")
