"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # Triton reads it when it is imported, by whichever test comes first
# One thread a process, as the stages compute (`runtime.threads`): pytest's workers share the cores, and the threads of
# several wait for one another so busily that small models train ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:       # as in a shell's background: what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter

VOCABULARY = 64
# A worker takes whole files: those that take longest start first, lest one be left alone at the end.
LONGEST = (
    "reproduce", "server", "surroundings", "stage_runner", "outputs", "annotation", "parallel", "trainer", "executor",
    "chat", "small_studies", "curate_own", "funnel", "mixer_triton", "bounds", "quality", "evaluate", "sources_changed",
    "launch", "export_stage", "trainer_recovery", "evaluation_items", "synthesis", "compress", "text_generation",
)


def write_token_files(directory: Path, documents: int = 60) -> Path:
    """A tokens directory of random documents in a language where each token has two successors; id 0 ends one and is
    no text, id n is 1 + n % 4 bytes of it."""
    generator = np.random.default_rng(0)
    successors = generator.integers(1, VOCABULARY, (VOCABULARY, 2))
    token_bytes = np.array([0, *(1 + token % 4 for token in range(1, VOCABULARY))], np.uint16)
    files = {}
    for name in ("train/code-high", "train/code-low", "train/docs-high", "validation/code", "validation/docs"):
        tokens = size = 0
        with IndexedDatasetWriter(directory / name, VOCABULARY) as writer:
            for _ in range(documents):
                document = [int(generator.integers(1, VOCABULARY))]
                for _ in range(int(generator.integers(10, 60))):
                    document.append(int(successors[document[-1], generator.integers(2)]))
                writer.add([*document, 0])
                tokens, size = tokens + len(document) + 1, size + int(token_bytes[document].sum())
        files[name] = {"documents": documents, "tokens": tokens, "bytes": size}
    contents = {"vocab_size": VOCABULARY, "eod_id": 0, "dtype": "uint16", "tokenizer_digest": "aa",
                "corpus_digest": "bb", "files": files}
    phases = [
        {"until": 0.6, "weights": {"train/code-high": 0.3, "train/code-low": 0.2, "train/docs-high": 0.5}},
        {"until": 1.0, "weights": {"train/code-high": 0.4, "train/docs-high": 0.6}},
    ]
    np.save(directory / "token_bytes.npy", token_bytes)
    (directory / "tokens.json").write_text(json.dumps(contents))
    (directory / "blend.json").write_text(json.dumps({"phases": phases}))
    return directory


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` reads only modules with such tests: a GPU machine may lack what others import."""
    if config.option.markexpr != "gpu":
        return None
    modules = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    return None if any("mark.gpu" in module.read_text() for module in modules) else True


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))       # torch was imported before the variable was set


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()         # what was imported stays: a collection that a stage asks for looks at what its test made alone


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """What a stage sets in the environment, such as to stay offline, ends with the file whose tests ran it."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk() -> Iterator[None]:
    """Only a machine that fails can tell whether a file is on the disk; `test_durable` sees to it that it was asked
    for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An archive in which every stage ran once, not to be changed; stage -> what it did."""
    from tests.archive import reproduce, unpack  # Numba, which a GPU machine may lack

    archive = unpack(tmp_path_factory.mktemp("smoke"))
    return archive, reproduce(archive, "--profile", "smoke")


@pytest.fixture(scope="session")
def token_files() -> Callable[..., Path]:
    return write_token_files


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files that are only read."""
    return write_token_files(tmp_path_factory.mktemp("tokens"))
