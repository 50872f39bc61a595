"""Real English text for the demo, without a download.

Python ships its own language reference as plain text (`pydoc_data.topics`, about 700 kB, what
``help("for")`` prints). This module writes it as two of Megatron's indexed datasets (``.bin`` and
``.idx``), one document per topic, one token per byte, and reads it back through Megatron's own
:class:`GPTDataset`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from forge_train.demo.config import VOCABULARY, RunConfig

#: Every 20th topic, in the order of their hashes, is kept for validation.
VALIDATION_EVERY = 20

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ByteTokenizer:
    """What GPTDatasetConfig asks of a tokenizer. Byte 0 does not occur in text: end of document."""

    vocab_size: int = VOCABULARY
    eod: int = 0
    pad: int = -1  # no padding token: the last, incomplete sample is dropped

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Goes into the name of the cached sample index."""
        return {"class": "forge_train.demo.ByteTokenizer"}


def _documents() -> dict[str, list[bytes]]:
    """The topics, as bytes, by split. The split of a topic depends on its name alone."""
    from pydoc_data.topics import topics

    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    splits: dict[str, list[bytes]] = {"train": [], "valid": []}
    for rank, name in enumerate(names):
        split = "valid" if rank % VALIDATION_EVERY == 0 else "train"
        splits[split].append(topics[name].encode())
    return splits


def prepare(root: Path) -> Path:
    """Write the indexed datasets ``train`` and ``valid`` once; return the folder that holds them.

    The folder is named after the text's hash (it differs between Python versions) and appears
    complete or not at all. One rank calls it before the others do.
    """
    documents = _documents()
    digest = hashlib.sha256()
    for split in documents.values():
        for text in split:
            digest.update(len(text).to_bytes(8, "little") + text)
    folder = root / f"python-topics-{digest.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    scratch = root / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    sizes = {}
    for split, texts in documents.items():
        prefix = str(scratch / split)
        # uint16: what Megatron expects of a vocabulary under 65536 (GPTDatasetConfig).
        builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=numpy.uint16)
        for text in texts:
            tokens = numpy.frombuffer(text + b"\0", dtype=numpy.uint8)
            builder.add_document(torch.from_numpy(tokens.astype(numpy.int32)), [tokens.size])
        builder.finalize(get_idx_path(prefix))
        sizes[split] = {"documents": len(texts), "bytes": sum(map(len, texts))}
    (scratch / "about.json").write_text(json.dumps(sizes, indent=2) + "\n")
    scratch.rename(folder)
    return folder


def build_datasets(config: RunConfig, folder: Path) -> tuple[GPTDataset, GPTDataset]:
    """Megatron's training and validation datasets: one epoch each, samples shuffled by the seed.

    Every sample is ``config.sequence`` tokens long. Collective: all ranks call it.
    """
    dataset_config = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.sequence,
        blend_per_split=[([str(folder / "train")], None), ([str(folder / "valid")], None), None],
        path_to_cache=str(folder / "index"),
        tokenizer=ByteTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [None, None, None], lambda: True, dataset_config
    ).build()
    return train, valid


class SampleStream:
    """An endless, resumable walk over a dataset: sample number ``n`` is a function of ``n`` alone.

    Epoch 0 takes Megatron's own shuffled order; later epochs permute it anew. So a run that is
    resumed, or prolonged with more steps, meets exactly the samples it would have met.
    """

    def __init__(self, dataset: GPTDataset, config: RunConfig, consumed: int = 0) -> None:
        self._dataset = dataset
        self._config = config
        self.consumed = consumed  # sequences handed out so far, over all steps
        self._epoch = 0
        self._order = numpy.arange(len(dataset))

    def _sample(self, number: int) -> Batch:
        epoch, index = divmod(number, len(self._dataset))
        if epoch != self._epoch:
            generator = numpy.random.default_rng((self._config.seed, epoch))
            self._order = (
                generator.permutation(len(self._dataset))
                if epoch
                else numpy.arange(len(self._dataset))
            )
            self._epoch = epoch
        return self._dataset[int(self._order[index])]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch: every value is ``[micro_batch_size, sequence]``."""
        size = self._config.micro_batch_size
        samples = [self._sample(self.consumed + i) for i in range(size)]
        self.consumed += size
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
