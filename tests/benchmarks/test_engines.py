"""What benchmarks/engines.py says of transformers, which is here, and of exports and classes that are wrong."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM

from benchmarks import engines
from model import hub

# Of the kind of the class that Nemotron-H has on the Hub: `_init_weights` writes dt_bias past transformers' guards of a
# tensor that was read. transformers 5.23 calls it no more where all of a module's tensors were read: here one is not.
REMOTE_CLASS = """
import torch
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM


class RemoteForCausalLM(NemotronHForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model._init_weights = self._init_weights
        for layer in self.model.layers:
            layer.mixer.register_buffer("steps", torch.zeros(1), persistent=False)

    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "dt_bias"):
            with torch.no_grad():
                module.dt_bias.copy_(torch.full_like(module.dt_bias, -3.0))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("engines") / "asked"
    engines.ask(out, [])
    return out


def answer(asked: Path, name: str, *, directory: Path | None = None, remote: bool = False) -> Any:
    """What transformers says of a question, of another directory if one is given."""
    question = asked / f"{name}.json"
    if directory:
        content = json.loads(question.read_text()) | {"directory": str(directory)}
        shutil.copy(question.with_suffix(".npy"), directory / "question.npy")
        question = directory / "question.json"
        question.write_text(json.dumps(content))
    return engines.compare(engines.transformers, question, argparse.Namespace(trust_remote_code=remote))


@pytest.mark.parametrize("name", ["random-hybrid", "random-transformer"])
def test_transformers_answers_as_we_do(asked: Path, name: str) -> None:
    found = answer(asked, name)
    assert 0 < found["logits_max_relative_difference"] < 1e-5 and found["wrong_from_token"] is None
    assert found["greedy_equal"]
    right, texts = found["texts_equal"].split(" of ")
    assert right == texts and int(texts) > 300


def test_what_is_wrong_is_said(asked: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(asked / "random-hybrid", tmp_path / "wrong")
    for file, changes in (("config.json", {"time_step_min": 0.5}),
                          ("tokenizer_config.json", {"split_special_tokens": False})):
        (directory / file).write_text(json.dumps(json.loads((directory / file).read_text()) | changes))
    found = answer(asked, "random-hybrid", directory=directory)
    assert found["wrong_from_token"] == 0 and found["logits_max_relative_difference"] > 1e-2
    right, texts = map(int, found["texts_equal"].split(" of "))
    assert right == texts - 3


def test_logits_that_are_no_numbers_are_wrong(asked: Path) -> None:
    def load(*_: object) -> engines.Engine:
        return engines.Engine("broken", lambda ids: np.full((len(ids), 512), np.nan, np.float32), lambda *_: [],
                              lambda text: [0])

    found = engines.compare(load, asked / "random-hybrid.json", argparse.Namespace())
    assert found["wrong_from_token"] == 0 and not found["greedy_equal"] and found["texts_equal"].startswith("0 of ")


def test_a_class_of_the_hub_that_draws_dt_bias_anew_is_noticed(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads with no word that a weight is missing; an export names no such class, so nobody is given it unasked."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    exported = asked / "random-hybrid"
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    directory = shutil.copytree(exported, tmp_path / "remote")
    (directory / "modeling_remote.py").write_text(REMOTE_CLASS)
    values = json.loads((directory / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}
    (directory / "config.json").write_text(json.dumps(values))
    found = answer(asked, "random-hybrid", directory=directory, remote=True)
    assert found["wrong_from_token"] == 0 and found["logits_max_relative_difference"] > 1e-2
    lost = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).model.layers[0].mixer.dt_bias
    assert torch.equal(lost, torch.full_like(lost, -3.0))
    assert answer(asked, "random-hybrid", directory=directory)["wrong_from_token"] is None     # transformers' own class
    assert torch.equal(hub.load(directory)[1]["backbone.layers.0.mixer.dt_bias"],
                       hub.load(exported)[1]["backbone.layers.0.mixer.dt_bias"])
