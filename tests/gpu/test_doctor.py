"""``python -m forge_train doctor`` on a GPU that works."""

from __future__ import annotations

import re

import torch
from gpu_cases import needs_gpu

from forge_train.cli import main

pytestmark = needs_gpu


def test_nothing_is_wrong(tmp_path, capsys):
    assert main(["doctor", "--device", "cuda:0", "--cache-dir", str(tmp_path)]) == 0
    output = re.sub(r"\n {20,}", " ", capsys.readouterr().out)
    assert not re.search(r"^(wrong|note)", output, re.M)
    assert torch.cuda.get_device_name(0) in output
    assert re.search(r"^ok +GPU 0: kernels +\d+ compiled, 0 found", output, re.M)
    assert re.search(r"^ok +GPU 0: results +fp32 has the CPU's bits", output, re.M)
