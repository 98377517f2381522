from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from tiny_engine import HYBRID, TRANSFORMER, run_processes
from torch.distributed.checkpoint import FileSystemWriter

from model.checkpoint import (
    describe,
    load_weights,
    open_weights,
    read_description,
    read_index,
    save_weights,
    to_engine,
    to_hub,
)
from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.integrity import write_sums
from model.megatron.distributed import ONE_COPY, Parallelism, process_groups
from model.megatron.engine_checkpoint import load_model, save_model
from model.megatron.precision import Precision
from model.megatron.spec import build_model


def random_state(config, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in HybridLM(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])
def test_round_trip(config, tmp_path):
    state = random_state(config)
    save_weights(tmp_path, config, state, {"tokens": 7, "validation_bits_per_byte": 1.25})
    loaded_config, loaded, training = load_weights(tmp_path)
    assert loaded_config == config
    assert training == {"tokens": 7, "validation_bits_per_byte": 1.25}
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype is torch.float32
        assert torch.equal(loaded[name], tensor), name
    assert not torch.distributed.is_initialized()


def test_query_key_and_value_rows_stand_by_group():
    """Megatron's order: the query heads of a group, its key, its value."""
    state = random_state(HYBRID)
    merged = to_engine(HYBRID, state)["decoder.layers.2.self_attention.linear_qkv.weight"]
    q, k, v = (state[f"backbone.layers.2.mixer.{name}_proj.weight"] for name in "qkv")
    assert torch.equal(merged, torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]]))
    assert all(torch.equal(tensor, state[name]) for name, tensor in to_hub(HYBRID, to_engine(HYBRID, state)).items())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_megatron_reads_ours_and_we_read_megatrons(precision, tmp_path):
    state = random_state(HYBRID)
    (tmp_path / "ours").mkdir()
    save_weights(tmp_path / "ours", HYBRID, state, {})
    with process_groups():
        model = build_model(HYBRID, Precision(precision), ONE_COPY, seed=1)
        load_model(tmp_path / "ours", model)
        assert torch.equal(model.output_layer.weight, state["lm_head.weight"].to(model.output_layer.weight.dtype))
        for name in ("megatrons", "déjà vu"):
            save_model(tmp_path / name, model)
    assert (tmp_path / "megatrons/common.pt").read_bytes() == (tmp_path / "déjà vu/common.pt").read_bytes()
    describe(tmp_path / "megatrons", HYBRID, {})
    loaded = load_weights(tmp_path / "megatrons")[1]
    assert loaded.keys() == state.keys() and {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    for name, tensor in state.items():
        kept = precision == "float32" or name.endswith(("A_log", "D", "dt_bias"))
        assert torch.equal(loaded[name], tensor if kept else tensor.bfloat16().float()), name


def test_the_same_weights_are_the_same_files(tmp_path):
    for name in ("a", "é"):
        (tmp_path / name).mkdir()
        save_weights(tmp_path / name, HYBRID, random_state(HYBRID), {"seed": 1})
    index = read_index(tmp_path / "é")
    index.storage_data = dict(reversed(index.storage_data.items()))             # as threads may finish
    (tmp_path / "é" / ".metadata").write_bytes(pickle.dumps(index))
    describe(tmp_path / "é", HYBRID, {"seed": 1})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {".metadata", "common.pt", "metadata.json", "model.json"} < set(files)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "é" / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_files_are_those_of_pytorchs_writer(tmp_path):
    """Which cannot be used: it keeps every tensor that it has written."""
    state = {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in random_state(HYBRID).items()}
    for name in "ab":
        (tmp_path / name).mkdir()
        save_weights(tmp_path / name, HYBRID, state, {})
    distributed_checkpoint.save(
        dict(to_engine(HYBRID, state)), storage_writer=FileSystemWriter(tmp_path / "b"), no_dist=True)
    describe(tmp_path / "b", HYBRID, {})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def of_layouts(token_files, tmp_path_factory) -> list[Path]:
    """Checkpoints of two processes: tensor, pipeline and data parallel, the last with the distributed optimizer."""
    directory = tmp_path_factory.mktemp("layouts")
    tokens = token_files(tmp_path_factory.mktemp("tokens"))
    layouts = [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {}]
    jobs = [{"tokens": str(tokens), "out": str(directory / f"out-{index}"), "scratch": str(directory / f"{index}"),
             "parallelism": layout, "precision": "bf16", "tokens_to_train_on": 4 * 16, "evaluations": 1,
             "micro_batch_size": 1, "validation_micro_batch_size": 2} for index, layout in enumerate(layouts)]
    run_processes(2, jobs, directory)
    return [Path(job["out"]) for job in jobs]


def test_any_layouts_checkpoint_is_read_tensor_by_tensor(of_layouts, tmp_path):
    from megatron.core.dist_checkpointing import load_plain_tensors

    for directory in of_layouts:
        with process_groups():
            expected = load_plain_tensors(str(directory))
        config, state, training = open_weights(directory)
        assert config == HYBRID and training["precision"] == "bf16"
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16, torch.float32}
        for name, tensor in to_engine(config, state).items():
            assert torch.equal(tensor, expected[name]), name
        for name, tensor in load_weights(directory)[1].items():
            assert torch.equal(tensor, state[name].float()), name
        (out := tmp_path / directory.name).mkdir()
        save_weights(out, config, state, training)
        for name, tensor in open_weights(out)[1].items():
            assert torch.equal(tensor, state[name]), name
    assert len({entry.relative_path for entry in read_index(of_layouts[0]).storage_data.values()}) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_but_what_is_asked_for_is_read_and_no_weight_that_is_not_finite(tmp_path, value):
    state = random_state(HYBRID)
    state["backbone.layers.0.mixer.in_proj.weight"][0, 0] = value
    save_weights(tmp_path, HYBRID, state, {})
    stored = open_weights(tmp_path)[1]
    assert list(stored) == list(stored.skeleton) and len(stored) == len(state) and "lm_head.weight" in stored
    assert {name: tensor.shape for name, tensor in stored.skeleton.items()} == {
        name: tensor.shape for name, tensor in state.items()}
    assert torch.equal(stored["backbone.layers.0.mixer.A_log"], state["backbone.layers.0.mixer.A_log"])
    for read in (lambda: stored["backbone.layers.0.mixer.in_proj.weight"], lambda: load_weights(tmp_path)):
        with pytest.raises(ModelError, match=r"in_proj\.weight\.z holds values that are not finite"):
            read()
    with pytest.raises(KeyError):
        stored["backbone.layers.0.mixer.missing"]
    with process_groups(), pytest.raises(ModelError, match=r"in_proj\.weight holds values that are not finite"):
        build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1, start=tmp_path)


@pytest.mark.parametrize("cut_at", [None, 0, 5000])
def test_a_file_that_is_missing_or_ends_early_is_named_though_it_is_sealed(tmp_path, cut_at):
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    file = tmp_path / "__0_0.distcp"
    whole = file.read_bytes()
    file.unlink() if cut_at is None else file.write_bytes(whole[:cut_at])
    write_sums(tmp_path)
    state = open_weights(tmp_path)[1]
    with pytest.raises(ModelError, match=r"output_layer\.weight cannot be read from __0_0\.distcp") as error:
        state["lm_head.weight"]
    assert str(error.value).count("\n") == 1


def test_a_tensor_of_which_a_part_is_missing_is_named(tmp_path):
    """Nothing would be read into the rest, which is left as the memory was."""
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    index = read_index(tmp_path)
    [part] = index.state_dict_metadata["output_layer.weight"].chunks
    part.sizes = torch.Size([63, 32])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    write_sums(tmp_path)
    refused = pytest.raises(ModelError, match=r"model\.json: missing output_layer\.weight\.")
    with refused:
        open_weights(tmp_path)
    with process_groups(), refused:
        build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1, start=tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    state, wider = random_state(HYBRID), HYBRID.model_copy(update={"ffn_hidden_size": 64})
    with pytest.raises(ModelError, match=r"1\.mixer\.up_proj\.weight is \(48, 32\), expected \(64, 32\)"):
        save_weights(tmp_path, wider, state, {})
    assert not list(tmp_path.iterdir())
    save_weights(tmp_path, HYBRID, state, {})
    describe(tmp_path, wider, {})
    with pytest.raises(ModelError, match=r"1\.mlp\.linear_fc1\.weight is \(48, 32\), expected \(64, 32\).*\nUse"):
        open_weights(tmp_path)


def test_layers_that_the_description_lacks_are_named(tmp_path):
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    shorter = HYBRID.model_copy(update={"pattern": HYBRID.pattern[:-1]})
    describe(tmp_path, shorter, {})
    refused = pytest.raises(ModelError, match=r"model\.json: unexpected decoder\.layers\.3\.\S+;")
    with refused:
        open_weights(tmp_path)
    with process_groups(), refused:
        build_model(shorter, Precision("float32"), ONE_COPY, seed=1, start=tmp_path)


@pytest.mark.parametrize(("change", "named"), [
    ({"ffn_hidden_size": 64}, "linear_fc1"), ({"pattern": HYBRID.pattern + "M"}, r"decoder\.layers\.4"),
])
def test_weights_of_another_model_are_not_loaded(tmp_path, change, named):
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    with process_groups():
        model = build_model(HYBRID.model_copy(update=change), Precision("float32"), ONE_COPY, seed=1)
        with pytest.raises(ModelError, match=rf"not the weights of this model: .*{named}.*\.\nUse"):
            load_model(tmp_path, model)


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(ModelError, match=r"model\.json") as error:
        load_weights(tmp_path)
    assert str(error.value).count("\n") == 1
    state = random_state(HYBRID)
    del state["backbone.layers.1.mixer.up_proj.weight"]
    with pytest.raises(ModelError, match="up_proj"):
        save_weights(tmp_path, HYBRID, state, {})
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    (tmp_path / "other").mkdir()
    save_weights(tmp_path / "other", TRANSFORMER, random_state(TRANSFORMER), {})
    shutil.copy(tmp_path / "other" / "model.json", tmp_path / "model.json")
    with pytest.raises(ModelError, match=r"model\.json: damaged or replaced"):
        load_weights(tmp_path)
    write_sums(tmp_path)
    with pytest.raises(ModelError, match=r"model\.json: missing decoder"):
        load_weights(tmp_path)


@pytest.mark.parametrize("content", [
    "[]", "{}", '{"model": 3, "training": {}}', '{"model": {}, "training": {}}', '{"model',
    json.dumps({"model": HYBRID.model_dump(mode="json"), "training": 3}),
])
def test_a_description_of_another_form_is_named(tmp_path, content):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.json: not a model description \(.+\)\.\nRun"):
        read_description(tmp_path)


def test_damage_anywhere_in_a_checkpoint_is_named(tmp_path):
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {"tokens": 7})
    for name in ("__0_0.distcp", ".metadata", "model.json", "common.pt", "SHA256SUMS"):
        path = tmp_path / name
        whole = path.read_bytes()
        for damage in (whole[: len(whole) // 2], flipped(whole), b"", None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(ModelError) as error:
                load_weights(tmp_path)
            assert (name in str(error.value) or name == "SHA256SUMS") and str(error.value).count("\n") == 1
            path.write_bytes(whole)
    assert load_weights(tmp_path)[2] == {"tokens": 7}
    (tmp_path / "__0_0.distcp").write_bytes(flipped((tmp_path / "__0_0.distcp").read_bytes()))
    with process_groups(), pytest.raises(ModelError, match=r"__0_0\.distcp: damaged or replaced"):
        build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1, start=tmp_path)


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


class Trap:
    """What a pickle runs as it is read."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_no_weight_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    place = min(read_index(tmp_path).storage_data.values(), key=lambda piece: piece.offset)
    for trap in (pickle.dumps(Trap()), torch_saved(Trap())):
        content = bytearray((tmp_path / "__0_0.distcp").read_bytes())
        content[: place.length] = trap[: place.length].ljust(place.length, b"\0")
        (tmp_path / "__0_0.distcp").write_bytes(content)
        write_sums(tmp_path)                                # whoever wrote it sealed it as well
        with pytest.raises(ModelError, match=r" cannot be read from __0_0\.distcp \(.+\)\.\n"):
            load_weights(tmp_path)
    assert not Path("sprung").exists()


def torch_saved(value: object) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize("asked", [distributed_checkpoint.load, FileSystemWriter, Parallelism])
def test_an_index_is_made_of_pytorchs_records_alone(tmp_path, asked):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(asked))                   # which is its name
    with pytest.raises(ModelError, match=f"it asks for {asked.__module__}.{asked.__name__}"):
        read_index(tmp_path)


@pytest.mark.parametrize("index", [Trap(), {"no": "index"}])
def test_nothing_in_a_checkpoint_is_executed(tmp_path, index, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path, HYBRID, random_state(HYBRID), {})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    write_sums(tmp_path)                                    # whoever wrote it sealed it as well
    with process_groups():
        model = build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1)
        for load in (lambda: load_weights(tmp_path), lambda: load_model(tmp_path, model)):
            with pytest.raises(ModelError, match=r"\.metadata: not the index of a checkpoint"):
                load()
    assert not Path("sprung").exists()
