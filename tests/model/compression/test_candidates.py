"""Maximal candidates against a brute-force search, and the paper's own search as far as it is known."""

import itertools
import random
from pathlib import Path

import pytest
import torch

from flows.profile import resolve
from model import costs
from model.compression import candidates
from model.compression.candidates import Budget, keep_top_layers, make_candidate, reverse_selection, share_budget
from model.compression.width_importance import WidthImportance
from model.config import ModelConfig, ModelError
from model.presets import PRESETS
from stages.frame.params import load_params


def budget(**changes) -> costs.Deployment:
    return costs.Deployment.of(100).model_copy(update=changes)


def memory_budget(deployment, limit) -> Budget:
    return Budget("memory (bytes)", limit, lambda config: costs.memory(config, deployment).total, "")


def maximal_cells(config, widths, least_attention, deployment, limit):
    """Counts and FFN width of the cells of the paper's grid under a memory budget."""
    return candidates.maximal_cells(config, widths, least_attention, [memory_budget(deployment, limit)])


def parent(pattern: str, **changes) -> ModelConfig:
    values = {
        "hidden_size": 16, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2, "sequence_length": 32,
        "vocab_size": 64,
    }
    return ModelConfig(pattern=pattern, **(values | changes))


@pytest.mark.parametrize("seed", range(12))
def test_cells_equal_brute_force(seed):
    """Under one budget to three: every cell that fits and that no other is at least as large as in every direction."""
    draw = random.Random(seed)
    pattern = "".join(draw.choice("M-M-*") for _ in range(draw.randint(6, 14))) + "-"
    config = parent(pattern, ffn_hidden_size=draw.choice([48, 64]), hidden_size=draw.choice([8, 24]))
    widths = draw.sample([16, 24, 32, 40, 48], 3)
    deployment = budget(context=draw.choice([10, 500]), weight_bits=draw.choice([4.5, 16]))
    latency = {symbol: draw.uniform(1, 3) for symbol in "M*-"}
    costs_of = [lambda c: costs.memory(c, deployment).total, costs.parameters,
                lambda c: sum(latency[symbol] for symbol in c.pattern)]
    attention = draw.randint(0, pattern.count("*"))
    least = {symbol: min(1, pattern.count(symbol)) for symbol in "M*-"}
    least["*"] = max(least["*"], attention)
    smallest = config.model_copy(update={"pattern": "".join(symbol * count for symbol, count in least.items()),
                                         "ffn_hidden_size": min(widths)})
    budgets = [Budget("", cost(smallest) + (cost(config) - cost(smallest)) * draw.uniform(0.05, 0.95), cost, "")
               for cost in costs_of[: 1 + seed % 3]]
    counts = [range(least[symbol], pattern.count(symbol) + 1) for symbol in "M*-"]
    fitting = [cell for point in itertools.product(*counts, widths) if all(
        each.cost((cell := candidates.Cell(*point)).config(config)) <= each.limit for each in budgets)]
    expected = sorted(cell for cell in fitting if not any(
        other != cell and all(x >= y for x, y in zip(other, cell, strict=True)) for other in fitting))
    assert candidates.maximal_cells(config, widths, attention, budgets) == expected and expected


def test_the_papers_search_holds_nemotron_h_47b(tmp_path, monkeypatch):
    """The 56B profile's grid, units and budget, which is 31.7 GiB less the 1.5 GiB that the paper's totals of the
    candidates exceed their weights and caches by."""
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    (tmp_path / "params.yaml").write_text(resolve("nemotron-h-56b"))
    params = load_params(tmp_path / "params.yaml")
    config, model = params.compress, params.model_of("hybrid-fp8")
    assert model == PRESETS["nemotron_h_56b"].model_copy(update={"vocab_size": params.tokenizer.vocab_size})
    limit = config.memory.budget_fraction * costs.memory(model, config.memory).total
    assert limit / 2**30 == pytest.approx(31.7 - 1.5, abs=0.01)
    cells = maximal_cells(model, config.ffn_widths, config.min_attention_layers, config.memory, limit)
    assert (45, 5, 48, 30_720) in cells


def test_attention_is_not_cut_below_its_minimum():
    config = parent("M-M-M-M*-M*-M*-", hidden_size=64)
    deployment = budget(context=300)            # the cache is most of the memory: attention would go first
    limit = int(costs.memory(config, deployment).total * 0.85)
    assert min(cell[1] for cell in maximal_cells(config, [64], 1, deployment, limit)) < 3
    assert all(cell[1] == 3 for cell in maximal_cells(config, [64], 3, deployment, limit))
    with pytest.raises(ModelError, match="min_attention_layers: 4 layers of attention cannot be kept"):
        maximal_cells(config, [64], 4, deployment, limit)


def test_a_budget_below_the_smallest_model_says_which_would_do():
    config = parent("M*-M*-")
    deployment = budget()
    smallest = costs.memory(config.model_copy(update={"pattern": "M*-", "ffn_hidden_size": 32}), deployment).total
    whole = costs.memory(config, deployment).total
    shares = [("memory (bytes)", lambda c: costs.memory(c, deployment).total, "compress.memory.budget_fraction"),
              ("parameters", costs.parameters, "compress.parameters_fraction")]
    budgets = [share_budget(name, share, cost, config, field)
               for (name, cost, field), share in zip(shares, ((smallest - 1) / whole, 0.99), strict=True)]
    with pytest.raises(ModelError) as error:
        candidates.maximal_cells(config, [32, 64], 1, budgets)
    wrong, cure = str(error.value).splitlines()
    assert "memory (bytes)" in wrong and "parameters" not in wrong and "budget_fraction" in cure
    share = float(cure.split()[3].rstrip("."))
    assert smallest / whole <= share < smallest / whole + 2e-4
    budgets[0] = share_budget(*shares[0][:1], share, *shares[0][1:2], config, shares[0][2])
    assert candidates.maximal_cells(config, [32, 64], 1, budgets) == [(1, 1, 1, 32)]


def test_a_width_beyond_the_parents_is_refused():
    with pytest.raises(ModelError, match="ffn_hidden_size") as error:
        maximal_cells(parent("M-"), [32, 65], 0, budget(), 10**9)
    assert len(str(error.value).splitlines()) == 2


def test_top_layers_are_kept_by_type_in_their_order():
    importance = [0.9, 0.1, 0.2, 0.3, 0.4, 0.2, 0.2]
    assert keep_top_layers("M-M*-M-", importance, {"M": 2, "*": 1, "-": 1}) == [0, 2, 3, 4]
    assert keep_top_layers("M-M*-M-", importance, {"M": 1, "*": 0, "-": 3}) == [0, 1, 4, 6]


def scores(config, neurons) -> WidthImportance:
    return WidthImportance(neurons, {index: torch.ones(config.mamba_num_heads, config.mamba_head_dim).double()
                                     for index, symbol in enumerate(config.pattern) if symbol == "M"}, {})


def test_a_candidate_counts_what_is_kept():
    config = parent("M-*-")
    neurons = {1: torch.tensor([8.0, 0.0] + [1.0] * 2 + [0.0] * 60).double(), 3: torch.ones(64).double()}
    cell = candidates.Cell(1, 1, 1, 1)
    found = make_candidate(config, cell, [4.0, 2.0, 3.0, 1.0], scores(config, neurons), budget())
    assert found.layers == [0, 1, 2] and found.config.pattern == "M-*" and found.config.ffn_hidden_size == 1
    assert found.selection.neurons[1].tolist() == [0] and not found.selection.mamba_heads
    assert found.importance == pytest.approx((4 + 2 * 8 / 10 + 3) / 10)
    assert found.parameters == costs.parameters(found.config)
    assert found.memory == costs.memory(found.config, budget())
    other = make_candidate(config, cell, [4.0, 2.0, 3.0, 1.0], scores(config, neurons), budget(), [3.0, 1.0, 2.0, 4.0])
    assert other.layers == [0, 2, 3] and other.importance == pytest.approx((4 + 3 + 1 / 64) / 10)
    least = [reverse_selection(config, found.config, layers, scores(config, neurons))
             for layers in ([4.0, 2.0, 3.0, 1.0], [4.0, 1.0, 3.0, 2.0])]
    assert [kept.layers for kept in least] == [[0, 2, 3], [0, 1, 2]] and least[1].neurons[1].tolist() == [1]
