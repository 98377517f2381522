"""What compression is planned to take, against what it does; and what is refused before it starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.compression import comparison
from model.compression import plan as plan_module
from model.compression.candidates import closed_budgets, maximal_cells
from model.compression.importance import layer_importance
from model.compression.layerwise import Kept
from model.compression.plan import Grid, check, importance_passes, layout_of, refusal, steps
from model.config import ModelError
from model.costs import layer_parameters
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY
from model.presets import PRESETS
from model.training.plan import GIB, MACHINES, Layout, forward_bytes
from tests.held_bytes import HeldBytes
from tests.model.compression.markov import CONFIG, markov, silent
from tests.model.compression.plain import PlainLayerwise
from tests.tiny_engine import RECIPE

H100 = MACHINES["h100"]
PARENT = PRESETS["nemotron_h_8b"]
SPLIT = Layout(16, 2, True, distributed_optimizer=True)


@pytest.fixture
def paper(config):
    """MiniPuzzle's sizes for the 8B model, in FP8."""
    return config.model_copy(update={
        "importance_samples": 128, "ffn_importance_samples": 1024, "ffn_widths": [16384, 18432, 21504],
        "ranked_by_agreement": 400, "ranked_by_task": 130, "finalists": 3, "ranking_samples": 128,
        "validation_samples": 128, "precision": "fp8", "short_distillation_tokens": 7_000_000_000,
        "distillation_tokens": 63_000_000_000, "global_batch_size": 768, "micro_batch_size": 1,
    })


def planned(parent, config, layout, machine=H100):
    grid = Grid.of(parent, config)
    return {step.name: step for step in steps(parent, config, RECIPE, layout, machine, grid)}, grid


def test_importance_runs_as_many_layers_as_planned():
    model, ran = PlainLayerwise(HybridLM(CONFIG)), []
    original = model.layer
    model.layer = lambda index, hidden: ran.append(index) or original(index, hidden)
    layer_importance(model, markov(2, 1)[:, :-1], 2, silent)
    layers = len(CONFIG.pattern)
    assert len(ran) == layers * importance_passes(layers, 1)
    assert importance_passes(118, 1) == 59.5 and importance_passes(8, 2) == 6.5


def test_the_student_is_the_largest_of_the_grid(paper):
    grid = Grid.of(PARENT, paper)
    assert all(budget.cost(grid.student) <= budget.limit for budget in closed_budgets(PARENT, paper))
    assert 0.5 < grid.kept < 1 and grid.student.pattern.count("M") <= 24
    kept = iter(PARENT.pattern)
    assert all(symbol in kept for symbol in grid.student.pattern)       # in the parent's order


def test_the_student_suits_the_pipeline(config):
    cut = config.model_copy(update={"ffn_widths": [48]})
    cells = {len(Grid.of(CONFIG, cut, stages).student.pattern) for stages in (1, 2)}
    assert len(Grid.of(CONFIG, cut, 2).student.pattern) % 2 == 0 and max(cells) < len(CONFIG.pattern)
    every = maximal_cells(CONFIG, config.ffn_widths, config.min_attention_layers, closed_budgets(CONFIG, config))
    even = [layers for cell in every if (layers := sum(cell.counts.values())) % 2 == 0]
    grid = Grid.of(CONFIG, config, 2)
    assert grid.candidates == len(even) < len(every)
    assert grid.kept == pytest.approx(sum(even) / len(even) / len(CONFIG.pattern))
    with pytest.raises(ModelError, match=r"candidates has layers for 97 pipeline stages\.\nLower runtime\.parallel"):
        Grid.of(CONFIG, cut, 97)


def test_steps_answer_to_sizes_and_layout(paper):
    found, grid = planned(PARENT, paper, SPLIT)
    ranked = min(400, grid.candidates)
    assert list(found) == ["layer importance", "neuron importance", f"ranking of {ranked}", "task",
                           "3 short distillations", "2 full distillations", "measures, controls"]
    assert found["2 full distillations"].seconds == pytest.approx(6 * found["3 short distillations"].seconds, rel=1e-3)
    # 8,192 positions x 10,752 neurons of a process, 16 bytes each, of 24 layers, and one layer's on their way
    scored = found["neuron importance"].memory - found["layer importance"].memory
    assert scored == 16 * 8192 * 10752 * 25
    by_mean, _ = planned(PARENT, paper.model_copy(update={"ffn_score": "l2_then_mean"}), SPLIT)
    assert by_mean["neuron importance"].memory == found["layer importance"].memory
    wider, _ = planned(PARENT, paper, SPLIT._replace(processes=32))
    assert wider["layer importance"].seconds == pytest.approx(found["layer importance"].seconds / 2)


def test_the_fullest_pipeline_stage_may_be_within(paper):
    parent = PARENT.model_copy(update={"pattern": "M" * 12 + "*" + "-" * 13 + "M*" * 2 + "-" * 9 + "M" * 10 + "*--",
                                       "vocab_size": 1024})
    layout = SPLIT._replace(pipeline=4)
    found, *_ = steps(parent, paper, RECIPE, layout, H100, Grid.of(parent, paper, layout.pipeline))
    weights = 13 * layer_parameters(parent, "-")                # of two processes, in BF16
    assert found.name == "layer importance"
    assert found.memory > weights + forward_bytes(parent, layout) + H100.reserved


def test_a_comparison_holds_five_times_its_logits(monkeypatch, paper):
    """With all of the vocabulary, and on one of two processes with a half; what the plan has of a ranking."""
    wide = CONFIG.model_copy(update={"vocab_size": 8192})
    model = HybridLM(wide).requires_grad_(False)
    sequences = torch.randint(0, 4096, (2, 65))
    monkeypatch.setitem(comparison.ROWS, "cpu", 64)
    for ranks in (1, 2):
        judge = PlainLayerwise(model)
        judge.tensor_ranks = ranks
        judge.over_tensor_ranks = lambda value, operation=None: value
        judge.head = lambda ranks=ranks: model.lm_head.weight[: 8192 // ranks]
        with HeldBytes(model.parameters()) as held:
            comparison.compare(judge, {"late": Kept(frozenset([5])), "itself": judge}, sequences, 1, silent)
        assert held.most == pytest.approx(5 * 4 * 64 * 8192 / ranks, rel=0.05)
    found, grid = planned(PARENT, paper, SPLIT)
    ranked = found[f"ranking of {min(400, grid.candidates)}"].memory
    logits = 4 * 8192 * PARENT.vocab_size / 2
    assert ranked - found["layer importance"].memory == pytest.approx(5 * logits - forward_bytes(PARENT, SPLIT))


def test_memory_of_the_8b_on_two_gpus_is_as_measured(paper):
    """docs/results/minipuzzle.md, two H200s; a plan counts what CUDA and NCCL take besides."""
    eight = paper.model_copy(update={"ranked_by_agreement": 10, "parameters_fraction": 0.83, "latency": None,
                                     "importance_samples": 8, "ffn_importance_samples": 8, "ranking_samples": 4})
    h200 = MACHINES["h200"]
    found, _ = planned(PARENT, eight, Layout(2, 2, True), h200)
    for name, measured in (("layer importance", 9.8), ("neuron importance", 40.7), ("ranking of 10", 18.1)):
        assert (found[name].memory - h200.reserved) / GIB == pytest.approx(measured, rel=0.1), name


def test_what_does_not_fit_is_refused_with_the_nearest_layout_that_does(paper):
    grid = Grid.of(PARENT, paper)
    crowded = SPLIT._replace(tensor=1, sequence=False)
    said = refusal(PARENT, paper, RECIPE, crowded, H100, grid)
    assert said is not None and said.startswith("compress does not fit: ") and len(said.splitlines()) == 2
    assert "a H100 SXM has 79.6.\nNearest that fits: tensor " in said
    assert refusal(PARENT, paper, RECIPE, SPLIT._replace(recompute="M-"), replace(H100, memory=200 * GIB), grid) is None
    tiny = replace(H100, memory=4 * GIB)
    assert "No layout of 16 GPUs fits: take more of them." in str(refusal(PARENT, paper, RECIPE, SPLIT, tiny, grid))


def test_a_layout_that_cannot_be_says_why(paper):
    with pytest.raises(ModelError, match="52 layers cannot be split into 3 pipeline stages"):
        planned(PARENT, paper, SPLIT._replace(pipeline=3, processes=18))


def test_the_check_before_work_asks_this_gpu(config, monkeypatch):
    check(CONFIG, config, RECIPE, ONE_COPY, 1)          # no GPU: nothing is known
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan_module, "machine_here", lambda: replace(H100, name="test GPU", memory=0.5 * GIB))
    with pytest.raises(ModelError, match=r"GiB, a test GPU has 0.5.\nNo layout of 1 GPUs fits"):
        check(CONFIG, config, RECIPE, ONE_COPY, 1)
    monkeypatch.setattr(plan_module, "machine_here", lambda: H100)
    check(CONFIG, config, RECIPE, ONE_COPY, 1)


def test_recomputation_of_a_distillation_is_its_own(config):
    recipe = RECIPE.model_copy(update={"recompute": "-"})
    assert layout_of(config, recipe, Layout()).recompute == "-"
    assert layout_of(config.model_copy(update={"recompute": ""}), recipe, Layout()).recompute == ""
