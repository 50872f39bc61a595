"""The text of the demo: the same every time, and nothing of it in both splits."""

from __future__ import annotations

import warnings
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import Finished

from forge_train.demo.config import RunConfig

with warnings.catch_warnings():  # of the optional packages that Megatron misses
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from forge_train.demo.data import SampleStream, prepare

pytestmark = pytest.mark.filterwarnings("ignore:.*copy keyword", "ignore:Could not determine rank")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


def _documents(prefix: Path) -> list[bytes]:
    return [bytes(tokens.astype("uint8")) for tokens in IndexedDataset(str(prefix))]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_preparation_is_deterministic(compared: Finished, prepared: Path) -> None:
    # The run prepared its data in another process, so with another seed of Python's hashes.
    (theirs,) = (compared.out / "data").iterdir()
    assert theirs.name == prepared.name
    assert set(_files(prepared)) == {
        "train.bin",
        "train.idx",
        "valid.bin",
        "valid.idx",
        "about.json",
    }
    assert _files(theirs) == _files(prepared)


def test_preparation_is_done_once(prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert prepare(prepared.parent) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before


def test_splits_are_disjoint_and_complete(prepared: Path) -> None:
    train, valid = (_documents(prepared / split) for split in ("train", "valid"))
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(text.encode() + b"\0" for text in topics.values())
    share = sum(map(len, valid)) / sum(map(len, train + valid))
    assert 0.01 < share < 0.15


def test_a_resumed_stream_meets_the_same_samples() -> None:
    # Each sample is one number, so that an epoch's order shows.
    dataset = [{"tokens": torch.tensor([number])} for number in range(10)]
    run = RunConfig(micro_batch_size=3)

    def walk(stream: SampleStream, batches: int) -> list[int]:
        return [int(token) for _ in range(batches) for token in next(stream)["tokens"]]

    whole = walk(SampleStream(dataset, run), 20)
    for done in range(20):
        resumed = SampleStream(dataset, run, consumed=3 * done)
        assert walk(resumed, 20 - done) == whole[3 * done :]
    for epoch in range(6):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[10:20] != whole[20:30]
    other = SampleStream(dataset, RunConfig(micro_batch_size=3, seed=4321))
    assert walk(other, 20) != whole
