"""Compression on several processes: scores, comparisons, distillation and the whole funnel are those of one."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from pydantic_core import to_jsonable_python

from model.checkpoint import load_weights, save_weights
from model.compression.comparison import compare, task_accuracy, task_items
from model.compression.importance import layer_importance
from model.compression.layerwise import Kept
from model.compression.prune import Selection, cut
from model.compression.width_importance import width_importance
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, Parallelism, process_groups
from model.megatron.layerwise import MegatronLayerwise
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from tests.model.compression.markov import CONFIG, Weights, markov, silent, write_tokens
from tests.model.compression.plain import PlainLayerwise
from tests.tiny_engine import RECIPE, run_processes

SPLIT = CONFIG.model_copy(update={"num_query_groups": 2, "pattern": "M-M*-M", "init_method_std": 0.2,
                                  "position_embedding": "rope"})
HERE = "tests.model.compression.test_parallel"
LAYOUTS = {
    "tensor": {"tensor": 2}, "sequence": {"tensor": 2, "sequence": True}, "pipeline": {"pipeline": 2}, "data": {},
}
BOTH = {"tensor": 2, "pipeline": 2, "sequence": True}      # of four processes


@pytest.fixture(scope="module")
def parent() -> Weights:
    """Random weights that write enough for a layer to matter."""
    torch.manual_seed(3)
    return Weights(SPLIT, {name: tensor.detach().clone() for name, tensor in HybridLM(SPLIT).state_dict().items()})


@pytest.fixture(scope="module")
def directory(parent, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("parallel")
    write_tokens(directory / "tokens")
    parent.save(directory / "parent")
    return directory


def masks() -> dict[str, Kept]:
    generator = torch.Generator().manual_seed(5)
    neurons = {layer: torch.randperm(48, generator=generator)[:32].sort().values for layer in (1, 4)}
    return {"late": Kept(frozenset([5])), "early": Kept(frozenset([0])), "both": Kept(frozenset([2, 3]), neurons),
            "nothing": Kept(frozenset()), "neurons": Kept(frozenset(), {4: neurons[4]})}


def scores(model, other) -> dict:
    """All that is asked of a model run layer by layer, as JSON."""
    sequences = markov(5, 2)
    widths = width_importance(model, sequences[:, :-1], 2, silent)
    questions = task_items(markov(8, 4)[:, :-1], 7, 1)      # of 31 tokens to be read: two processes cannot halve them
    models = masks() | {"other": other}
    return to_jsonable_python({
        "layers": layer_importance(model, sequences[:, :-1], 2, silent).tolist(),
        "neurons": {layer: values.tolist() for layer, values in widths.neurons.items()},
        "mamba": {layer: values.tolist() for layer, values in widths.mamba.items()},
        "reliability": widths.reliability,
        "closeness": {name: list(value) for name, value in compare(model, models, sequences, 2, silent).items()},
        "continuation": task_accuracy(model, models, questions, 3, silent),
    })


def score_job(directory: str, parallelism: dict, second_has_none: bool = False) -> dict:
    """`scores` of the parent by the engine, in one of several processes; where there are more data-parallel copies than
    samples the second has none."""
    from model.compression.funnel import Funnel

    with process_groups(Parallelism(**parallelism)):
        loader = Funnel.__new__(Funnel)
        loader.scored_in, loader.parallelism, loader.seed, loader.eod_id = (
            "float32", Parallelism(**parallelism), 1, None)
        model = loader.load(Path(directory) / "parent")
        if second_has_none:
            model.replica, model.replicas = 1000 * model.replica, 1
        return scores(model, loader.load(Path(directory) / "other"))


def divergence_job(vocab: int) -> list[float]:
    """Loss and gradient, each process having half of the vocabulary, where the teacher gives some tokens no chance."""
    from model.training.distillation import divergence

    with process_groups(Parallelism(tensor=2)):
        rank = torch.distributed.get_rank()
        student, teacher = (logits.chunk(2, -1)[rank].contiguous() for logits in logits_without_chances(vocab))
        loss = divergence(student.requires_grad_(), teacher)
        loss.backward()
        gradients = [torch.empty_like(student.grad) for _ in range(2)]
        torch.distributed.all_gather(gradients, student.grad)
    return [loss.item(), *torch.cat(gradients, -1).flatten().tolist()]


def logits_without_chances(vocab: int) -> list[torch.Tensor]:
    """Of student and teacher: one process has no chance in a row at all, in another row neither model gives any."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(5, vocab, generator=generator) for _ in range(2))
    teacher[0, : vocab // 2] = teacher[1, vocab // 2 :] = teacher[2, ::3] = -torch.inf
    student[1, vocab // 2 :] = student[2, ::6] = -torch.inf
    return [student, teacher]


def flat(value) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value, key=str) for number in flat(value[key])]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


@pytest.fixture(scope="module")
def other(parent, directory) -> Weights:
    other = Weights(*cut(*parent, Selection([0, 1, 3, 4])))
    save_weights((directory / "other").mkdir() or directory / "other", *other, {})
    return other


def test_a_token_without_a_chance_adds_nothing_to_a_split_divergence(tmp_path):
    (found,) = run_processes(2, [{"function": f"{HERE}.divergence_job", "vocab": 24}], tmp_path)
    logs, target = (logits.double().log_softmax(-1) for logits in logits_without_chances(24))
    chance = target.exp()
    loss = torch.where(chance > 0, chance * (target - logs), 0).sum(-1).mean()
    gradient = (logs.exp() - chance) / len(chance)
    assert found == pytest.approx([loss.item(), *gradient.flatten().tolist()], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param({"two at once": BOTH}, marks=pytest.mark.slow)])
def test_scores_on_processes_are_the_plain_models_on_one(parent, other, directory, tmp_path, layouts):
    expected = scores(*(PlainLayerwise(HybridLM.from_state(*weights)) for weights in (parent, other)))
    jobs = [{"function": f"{HERE}.score_job", "directory": str(directory), "parallelism": layout}
            for layout in layouts.values()]
    jobs.append(jobs[-1] | {"second_has_none": True})
    every = run_processes(2 if layouts is LAYOUTS else 4, jobs, tmp_path)
    for layout, found in zip([*layouts, "more copies than samples"], every, strict=True):
        for name, values in expected.items():
            assert flat(found[name]) == pytest.approx(flat(values), rel=2e-4, abs=1e-6), (layout, name)
    assert len(set(flat(expected["continuation"]))) > 1


def test_a_mask_computes_what_the_cut_model_does(parent):
    """Also the plain model's, in float64."""
    model, ids = HybridLM.from_state(*parent).double(), markov(3, 8)[:, :-1]
    states = PlainLayerwise(model).hidden(ids, list(masks().values()))
    assert torch.equal(next(states), model.backbone(ids))
    for name, mask in masks().items():
        layers = [layer for layer in range(6) if layer not in mask.left_out]
        neurons = {layer: mask.neurons.get(layer, torch.arange(48)) for layer in (1, 4)}
        if name == "neurons":
            continue        # two widths: no model of one configuration
        smaller = HybridLM.from_state(*cut(*parent, Selection(layers, neurons))).double()
        torch.testing.assert_close(next(states), smaller.backbone(ids), rtol=1e-6, atol=1e-6, msg=name)


def test_a_mask_is_of_layers_and_neurons_that_go():
    kept = Kept.of(CONFIG, Selection([0, 1, 2, 3, 4, 6], {1: torch.arange(48), 4: torch.arange(40)}))
    assert kept.left_out == {5} and kept.changes == {4, 5}
    for axis in ("mamba_heads", "mamba_channels"):
        with pytest.raises(ValueError, match="layers and FFN neurons only"):
            Kept.of(CONFIG, Selection(range(7), **{axis: {0: torch.tensor([0, 2])}}))


def test_hidden_states_under_a_mask_keep_the_models_number_format(directory):
    with process_groups():
        model = build_model(SPLIT, Precision("bf16"), ONE_COPY, 1, start=directory / "parent")
        states = MegatronLayerwise(model, SPLIT).hidden(markov(2, 3)[:, :-1], [masks()["neurons"]])
        assert [state.dtype for state in states] == [torch.bfloat16] * 2


class Stopped(Exception):
    pass


def distil_job(directory: str, scratch: str, parallelism: dict, config: dict, tokens: int, until: int = 0) -> list:
    """The curve of `other` distilled from the parent, in one of several processes; nothing where it is stopped after
    step `until`."""
    from model.compression.config import CompressConfig
    from model.compression.distill import School
    from model.compression.resume import ResultCache

    def progress(step: int, *_: object, **__: object) -> None:
        if step == until:
            raise Stopped

    root, layout, settings = Path(directory), Parallelism(**parallelism), CompressConfig(**config)
    with process_groups(layout), suppress(Stopped):
        school = School(root / "parent", markov(96, 1), root / "tokens", settings, RECIPE, "float32", 1,
                        ResultCache(Path(scratch)), layout, progress)
        return [list(row) for row in school.distil(root / "other", tokens, f"run-{tokens}").curve]


@pytest.fixture(scope="module")
def alone(other, directory, config, tmp_path_factory) -> tuple[dict, list]:
    """A distillation on one process, and its curve."""
    settings = config.model_copy(update={"micro_batch_size": 1, "checkpoint_every": 2})
    job = {"directory": str(directory), "tokens": 8 * 128, "parallelism": {},
           "config": settings.model_dump(mode="json"), "scratch": str(tmp_path_factory.mktemp("alone"))}
    return job | {"function": f"{HERE}.distil_job"}, distil_job(**job)


@pytest.mark.slow
def test_distillation_in_two_layouts_at_once_is_that_of_one_process(alone, tmp_path):
    job, expected = alone
    both = job | {"parallelism": BOTH, "scratch": str(tmp_path / "both")}
    [found] = run_processes(4, [both], tmp_path)
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-3)


def test_a_distillation_that_goes_on_in_other_layouts_is_that_of_one_process(alone, tmp_path):
    """In a pipeline, then tensor parallel without and with sequence parallelism, then data parallel."""
    job, expected = alone
    moved = job | {"scratch": str(tmp_path / "moved")}
    *stopped, found = run_processes(2, [
        moved | {"parallelism": LAYOUTS[layout], "until": until}
        for layout, until in (("pipeline", 3), ("tensor", 5), ("sequence", 7), ("data", 0))
    ], tmp_path)
    assert stopped == [None] * 3 and (tmp_path / "moved" / f"run-{8 * 128}" / "resumed").exists()
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-3)
    assert expected[-1][2] < 0.8 * expected[0][2]


def funnel_job(directory: str, scratch: str, parallelism: dict, config: dict) -> dict:
    """The funnel in one of several processes."""
    from stages.frame.worker import compress

    root = Path(directory)
    return to_jsonable_python(compress({
        "compress": config, "parallelism": parallelism, "parent": str(root / "parent"), "tokens": str(root / "tokens"),
        "scratch": scratch, "seed": 1, "recipe": RECIPE.model_dump(mode="json"),
    }, silent))


def test_the_funnel_on_two_processes_chooses_and_distils_the_same(directory, config, tmp_path):
    settings = config.model_copy(update={
        "micro_batch_size": 2, "ffn_widths": [32, 48], "finalists": 1, "distillation_tokens": 3 * 128,
        "short_distillation_tokens": 128, "checkpoint_every": 100, "importance_samples": 4,
        "ffn_importance_samples": 4, "validation_samples": 4, "ranking_samples": 4, "task_items": 4,
    }).model_dump(mode="json")
    job = {"directory": str(directory), "config": settings, "parallelism": {}, "scratch": str(tmp_path / "alone")}
    expected = funnel_job(**job)
    two = job | {"function": f"{HERE}.funnel_job", "parallelism": LAYOUTS["sequence"], "scratch": str(tmp_path / "two")}
    [found] = run_processes(2, [two], tmp_path)
    assert found["layers"] == expected["layers"] and found["metrics"].keys() == expected["metrics"].keys()
    for name in ("kl_parent_cut", "kl_parent_compressed", "kl_parent_random", "validation_bits_per_byte_parent"):
        assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-3), name
    assert [row[3] for row in found["curve"]] == pytest.approx([row[3] for row in expected["curve"]], rel=1e-3)
    for name, path in expected["models"].items():
        one, two = load_weights(Path(path))[1], load_weights(Path(found["models"][name]))[1]
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=2e-2, atol=2e-4, msg=key)
