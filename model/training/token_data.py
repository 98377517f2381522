"""Token files as training samples and validation sequences, through megatron-core's datasets (paper 2.2).

A tokens directory holds Megatron `.bin/.idx` files, `tokens.json` (what is in them), `token_bytes.npy` (UTF-8 bytes
that each id stands for) and `blend.json` (which share of training draws how much from which). Samples are
random-access: sample i is the same on every run and every process, so a resumed run goes on with the next one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from durable import new_directory, sha256
from model.config import PADDING, ModelError
from model.integrity import is_whole, write_sums
from model.megatron.distributed import device, is_main_process, main_process_first

DOCUMENTS = 2**31 - 1           # in a file: Megatron's indices of samples have int32 numbers of them
FIGURES = {"all", "first"}      # that stand beside those of domains: of all, and of the first evaluation


@dataclass(frozen=True)
class ValidationSet:
    """Held-out text of one domain.

    Attributes:
        sequences: (n, sequence_length + 1) int64; the last token of one is the first of the next, so that every token
            but the very first is predicted once.
        sizes: (n,) int64, UTF-8 bytes that each sequence's predicted tokens decode to. An end-of-document mark is
            predicted and has none; a token that is one byte of a character counts as that byte.
    """

    sequences: Tensor
    sizes: Tensor

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the predicted text."""
        return int(self.sizes.sum())

    def first(self, count: int) -> ValidationSet:
        """The first `count` sequences."""
        return ValidationSet(self.sequences[:count], self.sizes[:count])


def validation(tokens: Path, domain: str, sequence_length: int) -> ValidationSet:
    """The validation text of `domain` cut into sequences; what is left at the end is dropped.

    Raises:
        ModelError: no such domain, no text, less of it than one sequence, or token_bytes.npy of another tokenizer.
    """
    name = f"validation/{domain}"
    figures = _contents(tokens)["files"].get(name)
    if figures is None:
        raise ModelError(f"{tokens / 'tokens.json'}: no file {name}.\nRun `dvc repro tokenize` again.")
    if not figures["tokens"]:
        raise ModelError(
            f"{tokens / name}.bin: no text to validate on.\nRaise annotate.held_out.fraction, then run `dvc repro`."
        )
    dataset = IndexedDataset(str(tokens / name))            # its arrays are views that die with it
    stream = np.concatenate([dataset[document] for document in range(len(dataset))])
    count = (len(stream) - 1) // sequence_length
    if count < 1:
        raise ModelError(
            f"{tokens / name}.bin: {len(stream)} tokens are fewer than one sequence of {sequence_length} and its first "
            "prediction.\nRaise tokenize.validation_kilobytes_per_domain or lower the model's sequence_length."
        )
    table = np.load(tokens / "token_bytes.npy").astype(np.int64)
    if stream.max() >= len(table) or table[stream].sum() != figures["bytes"]:
        raise ModelError(
            f"{tokens / name}.bin: by token_bytes.npy its tokens are not the {figures['bytes']} bytes that tokens.json "
            "says.\nOne of the three is damaged or of another run: run `dvc repro tokenize` again."
        )
    starts = np.arange(count)[:, None] * sequence_length
    sequences = torch.from_numpy(stream[starts + np.arange(sequence_length + 1)].astype(np.int64))
    return ValidationSet(sequences, torch.from_numpy(table)[sequences[:, 1:]].sum(1))


def domains(tokens: Path) -> list[str]:
    """Domains with validation text, in the order of tokens.json. Raises ModelError where there are none, or one has the
    name of a figure over all."""
    names = [name.partition("/") for name in _contents(tokens)["files"]]
    found = [domain for split, _, domain in names if split == "validation"]
    if taken := sorted(FIGURES & set(found)):
        raise ModelError(
            f"{tokens / 'tokens.json'}: a domain is called {taken[0]}, as the records call a figure over all domains.\n"
            "Give it another name in annotate.sources."
        )
    if not found:
        raise ModelError(
            f"{tokens / 'tokens.json'}: no validation/DOMAIN among its files, so that nothing can be measured.\n"
            "Hold out text: raise annotate.held_out.fraction, then run `dvc repro`."
        )
    return found


def end_of_document(tokens: Path) -> int:
    """The id that ends every document."""
    return _contents(tokens)["eod_id"]


def check(tokens: Path, vocab_size: int) -> None:
    """See that the token files are whole and hold no ids but the model's.

    Raises:
        ModelError: tokens.json cannot be read, a file is missing, is not of the size tokens.json says or has more
            documents than Megatron can number, token_bytes.npy is not a number for each id, or the vocabulary is
            another than the model's.
    """
    contents = _contents(tokens)
    if not vocab_size - PADDING < contents["vocab_size"] <= vocab_size:
        raise ModelError(
            f"{tokens / 'tokens.json'}: a vocabulary of {contents['vocab_size']} ids, and the model has {vocab_size}.\n"
            "Set tokenizer.vocab_size to what the tokens were made with, or run `dvc repro tokenize` again."
        )
    table = tokens / "token_bytes.npy"
    try:
        shape = np.load(table).shape
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{table}: cannot be read ({error}).\nRun `dvc repro tokenize` again.") from None
    if shape != (contents["vocab_size"],):
        raise ModelError(
            f"{table}: of shape {shape}, and tokens.json says {contents['vocab_size']} ids.\n"
            "Run `dvc repro tokenize` again."
        )
    item_size = np.dtype(contents["dtype"]).itemsize
    for name, figures in contents["files"].items():
        data, index = tokens / f"{name}.bin", tokens / f"{name}.idx"
        for path in (data, index):
            if not path.exists():
                raise ModelError(f"{path}: not found, and tokens.json lists it.\nRun `dvc repro tokenize` again.")
        if data.stat().st_size != figures["tokens"] * item_size:
            raise ModelError(
                f"{data}: {data.stat().st_size} bytes, and tokens.json says {figures['tokens']} tokens of {item_size} "
                "each.\n"
                "The file is truncated or of another run: run `dvc repro tokenize` again."
            )
        if figures["documents"] > DOCUMENTS:
            raise ModelError(
                f"{data}: {figures['documents']:,} documents, of which Megatron can number {DOCUMENTS:,} in a file.\n"
                "Divide its domain among several in annotate.sources, so that each has fewer."
            )


def digests(tokens: Path) -> dict[str, str]:
    """Digests of the tokenizer and the corpus the files were made with."""
    contents = _contents(tokens)
    return {name: contents[name] for name in ("tokenizer_digest", "corpus_digest")}


def text_digests(tokens: Path) -> dict[str, str]:
    """Digests of what says which text there is and how much of it is read when."""
    return {name: sha256(tokens / name) for name in ("tokens.json", "blend.json")}


class TrainingData(Dataset[Tensor]):
    """The samples of a whole training run, in order, each (sequence_length + 1,) int64.

    Sample i of N lies in the phase whose share of training it falls in, and is drawn from that phase's files in
    proportion to their weights. A file goes on in a later phase where it stopped in an earlier one, so that text
    repeats only once all of the file has been read.

    Args:
        tokens: the tokens directory.
        sequence_length: tokens a sample predicts.
        samples: N.
        seed: of the order within files.
        cache: directory for Megatron's index files.

    Raises:
        ModelError: blend.json names a file that tokens.json lacks, or one without tokens; of a sample, an id beyond the
            vocabulary.
    """

    def __init__(self, tokens: Path, sequence_length: int, samples: int, seed: int, cache: Path):
        contents = _contents(tokens)
        self.tokens, self.vocab_size = tokens, contents["vocab_size"]
        phases = json.loads((tokens / "blend.json").read_text())["phases"]
        self.names = sorted({name for phase in phases for name, weight in phase["weights"].items() if weight > 0})
        for name in self.names:
            if contents["files"].get(name, {}).get("tokens", 0) < 1:
                raise ModelError(
                    f"{tokens / 'blend.json'}: phases draw from {name}, which has no tokens in tokens.json.\n"
                    "Run `dvc repro tokenize` again."
                )
        self.file_of_sample, self.position_in_file = self._draw(phases, samples)
        drawn = np.bincount(self.file_of_sample, minlength=len(self.names))
        ends = pairwise([0, *(round(phase["until"] * samples) for phase in phases)])
        left_out = [f"the phase until {phase['until']}" for phase, (start, end) in zip(phases, ends, strict=True)
                    if start == end] + [name for name, count in zip(self.names, drawn, strict=True) if not count]
        if left_out and is_main_process():
            print(f"{tokens / 'blend.json'}: of {samples} sample{'s' * (samples > 1)} there is none for "
                  f"{', '.join(left_out)}.", flush=True)
        with main_process_first(), _whole(cache) as directory:
            config = GPTDatasetConfig(
                random_seed=seed, sequence_length=sequence_length, split="1,0,0", path_to_cache=str(directory),
                tokenizer=_Vocabulary(contents, sha256(tokens / "tokens.json")), reset_position_ids=False,
                reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
            )
            self.files = [
                _dataset(str(tokens / name), int(count), config) if count else None
                for name, count in zip(self.names, drawn, strict=True)
            ]

    def _draw(self, phases: list[dict[str, Any]], samples: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample the file and the position in that file's own order, by Megatron's blending rule."""
        index = {name: position for position, name in enumerate(self.names)}
        used = np.zeros(len(self.names), dtype=np.int64)
        files, positions, start = [], [], 0
        for phase in phases:
            end = round(phase["until"] * samples)
            members = [(index[name], weight) for name, weight in phase["weights"].items() if weight > 0]
            weights = np.array([weight for _, weight in members], dtype=np.float64)
            choice, position = np.zeros(end - start, dtype=np.int16), np.zeros(end - start, dtype=np.int64)
            helpers.build_blending_indices(
                choice, position, weights / weights.sum(), len(members), end - start, False
            )
            file = np.array([member for member, _ in members])[choice]
            files.append(file)
            positions.append(position + used[file])
            used += np.bincount(file, minlength=len(used))
            start = end
        return np.concatenate(files), np.concatenate(positions)

    def __len__(self) -> int:
        return len(self.file_of_sample)

    def __getitem__(self, sample: int) -> Tensor:
        number = self.file_of_sample[sample]
        item = self.files[number][int(self.position_in_file[sample])]
        ids = torch.cat([item["tokens"], item["labels"][-1:]])
        if wrong := ids[(ids < 0) | (ids >= self.vocab_size)].tolist():     # tensor-parallel: zeros
            raise ModelError(
                f"{self.tokens / self.names[number]}.bin: holds the id {wrong[0]}, and the vocabulary has "
                f"{self.vocab_size}.\nIt is damaged or of another tokenizer: run `dvc repro tokenize` again."
            )
        return ids


class Prefetcher:
    """Batches by number (from 1), the next ones made by a thread while one is in use; any may be asked for.

    Args:
        make: batch of a number, the same whenever it is made.
        last: the last number there is.
    """

    NUMBER = 2                  # batches made ahead

    def __init__(self, make: Callable[[int], Tensor], last: int):
        self.make, self.last = make, last
        here = device()             # a new thread would pin memory through the first GPU
        on_gpu = here.type == "cuda"
        self.thread = ThreadPoolExecutor(1, initializer=partial(torch.cuda.set_device, here) if on_gpu else None)
        self.waiting: dict[int, Future[Tensor]] = {}

    def __getitem__(self, number: int) -> Tensor:
        wanted = range(number, min(number + self.NUMBER, self.last) + 1)
        self.waiting = {
            each: self.waiting.get(each) or self.thread.submit(self.make, each) for each in wanted
        }
        return self.waiting.pop(number).result()

    def close(self) -> None:
        """End the thread; batches not yet begun are not made."""
        self.thread.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _whole(cache: Path) -> Iterator[Path]:
    """`cache` where it exists and is whole, else a directory that becomes it when the block ends well: Megatron would
    take an index file that is damaged, or that a killed process left half-written, for whole."""
    if cache.exists() and is_main_process() and not is_whole(cache):
        shutil.rmtree(cache)
    if cache.exists():
        yield cache
        return
    with new_directory(cache) as partial:
        yield partial
        write_sums(partial)


def _contents(tokens: Path) -> dict[str, Any]:
    path = tokens / "tokens.json"
    try:
        contents = json.loads(path.read_text())
        missing = {"vocab_size", "eod_id", "dtype", "tokenizer_digest", "corpus_digest", "files"} - contents.keys()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).\nRun `dvc repro tokenize` again.") from None
    if missing:
        raise ModelError(f"{path}: without {', '.join(sorted(missing))}.\nRun `dvc repro tokenize` again.")
    return contents


def _dataset(prefix: str, samples: int, config: GPTDatasetConfig) -> GPTDataset:
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed.sequence_lengths), dtype=np.int32)
    return _Epochs(indexed, prefix, documents, samples, Split.train, config)


class _Epochs(GPTDataset):
    """Megatron's samples of a file, one reading of it after another.

    Megatron itself shuffles all readings but the last together: after one reading's worth of samples a quarter of the
    documents has not been seen, and another quarter more than once. Here every reading has an order of its own, of
    documents and of samples; the sample in which it ends comes last. A file that is read once is Megatron's as it is.
    """

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents of all readings (int32), the place in them where each sample begins (samples + 1, 2), and the
        order of the samples; kept in files, which other processes map."""
        tokens = self._get_num_tokens_per_epoch()
        readings = self._get_num_epochs(tokens)
        if readings == 1:
            built: tuple[np.ndarray, np.ndarray, np.ndarray] = super()._build_document_sample_shuffle_indices()
            return built
        cache = Path(self.config.path_to_cache)
        kept = [cache / f"{self.unique_description_hash}-{name}.npy" for name in ("documents", "samples", "order")]
        if not all(file.exists() for file in kept):
            random, length = np.random.RandomState(self.config.random_seed), self.config.sequence_length
            documents = np.concatenate([random.permutation(self.indices) for _ in range(readings)]).astype(np.int32)
            begins = helpers.build_sample_idx(
                self.dataset.sequence_lengths, documents, length, readings, tokens, True, True
            )
            order = np.arange(len(begins) - 1)
            ends = np.unique(-(-np.arange(1, readings) * tokens // length) - 1)     # where a reading ends within one
            for start, end in zip([0, *(ends + 1)], [*ends, len(order)], strict=True):
                random.shuffle(order[start:end])
            cache.mkdir(parents=True, exist_ok=True)
            for file, values in zip(kept, (documents, begins, order), strict=True):
                np.save(file, values)
        documents, begins, order = (np.load(file, mmap_mode="r") for file in kept)
        return documents, begins, order


class _Vocabulary:
    """What Megatron's datasets ask of a tokenizer; the digest of tokens.json keeps index caches of other text apart."""

    def __init__(self, contents: dict[str, Any], digest: str):
        self.eod = contents["eod_id"]
        self.pad = -1                       # no token: documents are packed, nothing is padded
        self.vocab_size = contents["vocab_size"]
        self.unique_identifiers = {"tokens.json": digest}
