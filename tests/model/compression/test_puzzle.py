"""Puzzle's program against trying everything, and its models against what they stand for."""

import random

import pytest
import torch
from scipy.stats import spearmanr

from model import costs
from model.compression.comparison import compare
from model.compression.prune import Selection, cut
from model.compression.puzzle import Library, Limit, Variant, brute_force, geometry, library, pool, solve
from model.compression.width_importance import select, width_importance
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent


def instance(seed):
    draw = random.Random(seed)
    pattern = "".join(draw.choice("M-*") for _ in range(draw.randint(4, 6)))
    scores = [[0.0, *sorted(draw.uniform(0, 1) for _ in range(draw.randint(1, 4)))] for _ in pattern]
    limits = []
    for name in ("memory", "latency", "parameters")[: draw.randint(1, 3)]:
        table = [[*sorted((draw.uniform(1, 9) for _ in options[1:]), reverse=True), 0.0] for options in scores]
        whole = sum(options[0] for options in table)
        limits.append(Limit(name, table, draw.uniform(0.3, 0.9) * whole))
    least = {draw.choice(pattern): 1} if draw.random() < 0.5 else {}
    return pattern, scores, limits, least


def total(scores, choice):
    return sum(options[j] for options, j in zip(scores, choice, strict=True))


@pytest.mark.parametrize("seed", range(24))
def test_the_program_finds_what_brute_force_finds(seed):
    pattern, scores, limits, least = instance(seed)
    expected = brute_force(pattern, scores, limits, least)
    assert expected is not None
    assert total(scores, solve(pattern, scores, limits, least)) == pytest.approx(total(scores, expected), abs=1e-9)


def test_each_solution_of_a_pool_differs_from_those_before():
    pattern, scores, limits, _ = "M-*-M-", [[0.0, 0.2, 0.3, 1.0]] * 6, [Limit("memory", [[4.0, 3, 2, 0]] * 6, 15.0)], {}
    found = pool(pattern, scores, limits, 5, 0.5)
    values = [total(scores, choice) for choice in found]
    assert len(found) == 5 and values == sorted(values)
    for number, choice in enumerate(found):
        for other in found[:number]:
            assert sum(a == b for a, b in zip(choice, other, strict=True)) <= 3


def test_an_infeasible_limit_is_named_with_the_nearest_that_would_do():
    pattern, scores = "M-", [[0.0, 1.0], [0.0, 0.3, 1.0]]
    limits = [Limit("memory", [[4.0, 0.0], [4.0, 2.0, 0.0]], 3.0), Limit("latency", [[1.0, 0.0], [1.0, 1.0, 0.0]], 9.0)]
    with pytest.raises(ModelError) as error:
        solve(pattern, scores, limits, {"M": 1})
    wrong, cure = str(error.value).splitlines()
    assert "memory 3" in wrong and "latency" not in wrong and "memory 4." in cure
    assert solve(pattern, scores, [limits[0]._replace(limit=4.0), limits[1]], {"M": 1}) == [0, 2]
    with pytest.raises(ModelError, match="keeps the layers asked for"):
        solve(pattern, scores, limits, {"M": 2})


@pytest.fixture(scope="module")
def space(parent, data):
    teacher = HybridLM.from_state(*parent)
    variants = library(parent.config, {"-": [16, 24, 32], "M": [2], "*": [1]})
    importance = width_importance(teacher, data.calibration, 8, silent)
    return teacher, variants, Library(teacher, parent.state, variants, importance)


def test_the_library_holds_every_width_and_nothing(parent, space):
    _, variants, _ = space
    assert variants[1] == [Variant(1, 48), Variant(1, 32), Variant(1, 24), Variant(1, 16), Variant(1, None)]
    assert variants[3] == [Variant(3, 2), Variant(3, 1), Variant(3, None)] and variants[0][1] == Variant(0, 2)


def test_an_assembled_model_is_the_cut_model(parent, data, space):
    """All FFN layers of one width, one layer gone and every Mamba layer of two heads: what `cut` makes of it."""
    teacher, _, made = space
    importance = width_importance(teacher, data.calibration, 8, silent)
    kept = [0, 1, 2, 3, 5, 6]
    shape = parent.config.model_copy(update={"pattern": "M-M*M-", "ffn_hidden_size": 24, "mamba_num_heads": 2})
    expected = HybridLM.from_state(*cut(*parent, select(parent.config, shape, kept, importance)))
    assembled = made.assemble([1, 2, 1, 0, 4, 1, 2])
    with torch.no_grad():
        one, other = (model(data.validation[:4, :-1]) for model in (assembled, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        whole = made.assemble([0] * 7)(data.validation[:4, :-1])
    assert torch.equal(whole, teacher(data.validation[:4, :-1]))


def test_summed_scores_rank_models_as_their_true_divergence_does(parent, data, space):
    """Scored on calibration tokens, judged on held-out ones; and the program's choice beats the best of 40 draws."""
    teacher, variants, made = space
    scores = made.scores(data.calibration, 8, silent)
    with torch.no_grad():
        without = HybridLM.from_state(*cut(*parent, Selection([0, 1, 2, 3, 4, 6])))(data.calibration)
        whole = teacher(data.calibration)
    expected = (whole.log_softmax(-1).exp() * (whole.log_softmax(-1) - without.log_softmax(-1))).sum(-1).mean()
    assert scores[5][-1] == pytest.approx(expected.item(), rel=1e-3) and scores[0][0] == 0

    table = [[float(costs.layer_parameters(geometry(parent.config, v), parent.config.pattern[v.layer])) if v.width else
              0.0 for v in options] for options in variants]
    limit = Limit("parameters", table, 0.7 * sum(options[0] for options in table))
    draw = random.Random(1)
    drawn = []
    while len(drawn) < 40:
        choice = [draw.randrange(len(options)) for options in variants]
        if total(table, choice) <= limit.limit and choice not in drawn:
            drawn.append(choice)
    solution = solve(parent.config.pattern, scores, [limit], {"M": 1, "*": 1, "-": 1})
    models = {str(number): made.assemble(choice) for number, choice in enumerate([*drawn, solution])}
    true = {name: value.kl for name, value in compare(teacher, models, data.validation, 8, silent).items()}
    random_kl = [true[str(number)] for number in range(40)]
    assert spearmanr([total(scores, choice) for choice in drawn], random_kl).statistic > 0.8
    assert true["40"] < min(random_kl)
