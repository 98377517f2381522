"""The whole search and distillation on a tiny parent: what it finds, and that a kill changes nothing."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import sem

from model import costs
from model.checkpoint import describe, load_weights, read_description
from model.compression import funnel, latency
from model.compression.candidates import random_selection
from model.compression.comparison import Closeness
from model.compression.funnel import evenly
from model.compression.prune import cut
from model.compression.resume import ResultCache
from model.compression.width_importance import WidthImportance
from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, Parallelism, process_groups
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from model.training.token_data import end_of_document
from tests.closeness import relative_error
from tests.model.compression.markov import CONFIG, Weights, silent
from tests.tiny_engine import RECIPE

SHORT = {"distillation_tokens": 128, "short_distillation_tokens": 128, "finalists": 1, "ranked_by_task": 2,
         "ranked_by_agreement": 2, "random_draws": 1, "ffn_widths": [32, 48]}


@pytest.fixture(scope="module")
def compress(tokens, data, tmp_path_factory):
    """The funnel on weights; a second call in the same directory goes on where the first was."""
    def run(weights, config, directory=None, progress=silent):
        directory = directory or tmp_path_factory.mktemp("compress")
        with process_groups():
            return funnel.compress(weights.save(directory / "parent"), tokens, data, config, RECIPE, 1,
                                   directory / "scratch", progress)
    return run


@pytest.fixture(scope="module")
def planted(parent) -> Weights:
    """The parent with layer 2 (Mamba-2) and layer 4 (FFN) writing nothing, and 16 dead neurons in the other FFNs."""
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.2.mixer.out_proj.weight"].zero_()
    state["backbone.layers.4.mixer.down_proj.weight"].zero_()
    for index in (1, 6):
        dead = torch.randperm(48, generator=torch.Generator().manual_seed(index))[:16]
        state[f"backbone.layers.{index}.mixer.up_proj.weight"][dead] = 0
    return Weights(parent.config, state)


@pytest.fixture
def tight(planted, config):
    """A budget that the parent without its planted layers and neurons just meets."""
    target = planted.config.model_copy(update={"pattern": "M-*M-", "ffn_hidden_size": 32})
    target_bytes, parent_bytes = (costs.memory(c, config.memory).total for c in (target, planted.config))
    memory = config.memory.model_copy(update={"budget_fraction": (target_bytes + 0.5) / parent_bytes})
    return config.model_copy(update={"memory": memory, "distillation_tokens": 8 * 128,
                                     "short_distillation_tokens": 128})


@pytest.fixture(scope="module")
def unbroken(compress, planted, config):
    """A short run, of how many steps."""
    steps = 0

    def count(*_, **__):
        nonlocal steps
        steps += 1

    short = config.model_copy(update={"distillation_tokens": 3 * 128, "short_distillation_tokens": 2 * 128,
                                      "checkpoint_every": 2})
    return compress(planted, short, progress=count), short, steps


def test_the_funnel_finds_what_does_not_matter(compress, planted, tight):
    result = compress(planted, tight)
    metrics = result.metrics
    winner = result.records["candidates"][0]
    assert winner.pattern == "M-*M-" and winner.ffn_hidden_size == 32 and winner.chosen
    assert result.layers["compressed"] == [0, 1, 3, 5, 6]
    assert winner.importance == pytest.approx(1.0, abs=1e-9) and winner.agreement > 0.99
    assert metrics["kl_parent_cut"] < 1e-6
    assert metrics["kl_parent_random_cut"] > 0.05
    assert metrics["kl_parent_random"] < metrics["kl_parent_random_cut"]
    assert metrics["agreement_compressed"] > metrics["agreement_random"]
    assert metrics["compressed_memory_gib"] <= metrics["budget_gib"] < metrics["parent_memory_gib"]
    for name in ("compressed", "random"):
        model, state, _ = load_weights(result.models[name])
        assert model.pattern.count("M") == 2 and model.ffn_hidden_size == 32
        assert sum(tensor.numel() for tensor in state.values()) == metrics["compressed_parameters"]
        HybridLM.from_state(model, state)
    assert load_weights(result.models["compressed"])[0].pattern == "M-*M-"


def test_the_records_have_what_the_report_reads(unbroken, planted, data):
    result, config, _ = unbroken
    importance, candidates = result.records["importance"], result.records["candidates"]
    assert [layer.symbol for layer in importance.layers] == list("M-M*-M-")
    assert [entry.index for entry in importance.ffn] == [1, 4, 6]
    shares = importance.ffn[0].kept_share_of_importance
    assert list(shares) == [16, 24, 28, 32, 48] and shares[16] < shares[24] < shares[32]
    assert [shares[32], shares[48]] == pytest.approx([1, 1], rel=1e-12)       # sixteen of them are dead
    assert len(candidates) == result.metrics["candidates"] > config.ranked_by_agreement
    assert [candidate.rank for candidate in candidates] == list(range(1, len(candidates) + 1))
    assert [candidate.kl_short is not None for candidate in candidates[:3]] == [True, True, False]
    assert candidates[0].kl_short <= candidates[1].kl_short
    compared = [candidate.agreement for candidate in candidates if candidate.agreement is not None]
    assert len(compared) == config.ranked_by_agreement
    assert [candidate.chosen for candidate in candidates] == [True] + [False] * (len(candidates) - 1)
    left = [candidate.importance for candidate in candidates if candidate.agreement is None]
    assert left == sorted(left, reverse=True)
    assert {row[0] for row in result.curve} == {"compressed", "random"}
    assert len(result.curve) == 6 and result.metrics["distillation_tokens"] == result.curve[-1][2] == 3 * 128
    assert result.metrics["neuron_split_half_correlation"] > 0.5 and result.metrics["validation_samples"] == 16
    # Two bytes a token: bits per byte of the parent are half its loss in bits.
    with torch.no_grad():
        logits = HybridLM.from_state(*planted)(data.validation[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), data.validation[:, 1:].flatten())
    assert result.metrics["validation_bits_per_byte_parent"] == pytest.approx(loss.item() / 2 / 0.693147181, rel=1e-5)


def test_the_record_of_importance_has_means_standard_errors_and_shares(config):
    scores = torch.rand(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    widths = WidthImportance({index: index * torch.arange(48.0) for index in (6, 1)}, {0: 3 * torch.ones(4, 16)}, {})
    record = funnel.importance_record(CONFIG, scores, widths, config)
    assert [layer.importance for layer in record.layers] == pytest.approx(scores.mean(1).tolist())
    assert [layer.standard_error for layer in record.layers] == pytest.approx(sem(scores.numpy(), axis=1).tolist())
    assert [(entry.index, entry.kept_share_of_importance[16]) for entry in record.ffn] == [
        (index, pytest.approx(sum(range(32, 48)) / sum(range(48)))) for index in (1, 6)]
    assert record.mamba_heads == {0: [12.0] * 4} and record.samples == {"layers": 8, "widths": 16}


@pytest.mark.parametrize("pattern", ["----", "M-M-", "MMMM", "****"])
def test_layers_of_one_type(compress, config, pattern):
    """No caches, no FFN layers or no attention: what a parent has not costs nothing, and is predicted to. Neurons that
    it has not, or whose scores are all nothing, are not called reliable."""
    torch.manual_seed(0)
    geometry = CONFIG.model_copy(update={"pattern": pattern})
    state = HybridLM(geometry).state_dict()
    if pattern == "M-M-":
        state = {name: 0 * tensor if name.endswith("up_proj.weight") else tensor for name, tensor in state.items()}
    short = config.model_copy(update=SHORT | {"min_attention_layers": pattern.count("*") // 4})
    metrics = compress(Weights(geometry, state), short).metrics
    assert metrics["cache_bytes_prediction_error"] == 0
    assert metrics["compressed_parameters"] < metrics["parent_parameters"]
    assert ("neuron_split_half_correlation" in metrics) == (pattern == "----")


def test_the_random_control_is_drawn_by_its_seed_alone(planted):
    changes = {"pattern": "M-*-", "ffn_hidden_size": 32, "mamba_num_heads": 2}
    shape = planted.config.model_copy(update=changes)
    drawn = [random_selection(planted.config, shape, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0].layers == drawn[1].layers
    assert all(torch.equal(drawn[0].neurons[layer], kept) for layer, kept in drawn[1].neurons.items())
    assert len({tuple(selection.layers) for selection in drawn}) > 1
    for selection in drawn:
        config, state = cut(*planted, selection)
        assert sorted(config.pattern) == sorted("M-*-") and (config.mamba_num_heads, config.ffn_hidden_size) == (2, 32)
        HybridLM.from_state(config, state)


@pytest.mark.parametrize(("asked", "finalists", "expected"), [(4, 2, [3, 0, 1, 4, 2, 6, 5]),
                                                              (2, 1, [1, 4, 0, 3, 2, 6, 5])])
def test_rounds_add_up_ranks(data, config, tmp_path, monkeypatch, asked, finalists, expected):
    """Of agreement, accuracy and the task; of equal sums the nearer parent goes on, and a distillation has the word."""
    candidates = [SimpleNamespace(importance=importance, selection=index)
                  for index, importance in enumerate((0.9, 0.7, 0.95, 0.6, 0.8, 0.5, 0.55))]
    cut = {2: (0.2, 0.5, 0.4), 0: (0.5, 0.9, 0.5), 4: (0.4, 0.8, 0.6), 1: (0.3, 0.7, 0.8), 3: (0.1, 0.6, 0.7)}
    distilled = {"short-0": 0.9, "short-3": 0.8, "short-1": 0.7}
    answers = {0: 0.8, 3: 0.6, 4: 0.3, 1: 0.2}

    def compared(teacher, models, held_out, *_):
        assert torch.equal(held_out, evenly(data.validation, 8))
        return {name: Closeness(*cut[model], 0.0) if isinstance(model, int) else Closeness(distilled[model], 0, 0, 0)
                for name, model in models.items()}

    monkeypatch.setattr(funnel, "compare", compared)
    monkeypatch.setattr(funnel, "task_accuracy", lambda _, models, *__: {name: answers[int(name)] for name in models})
    run = SimpleNamespace(
        config=config.model_copy(update={"ranked_by_agreement": 5, "ranked_by_task": asked, "finalists": finalists}),
        data=data, seed=1, cache=ResultCache(tmp_path), progress=silent, teacher=None, mask=int, load=str,
        distil=lambda selection, tokens, name: SimpleNamespace(directory=name))
    run._closeness_once = partial(funnel.Funnel._closeness_once, run)
    rounds = funnel.Funnel.rounds(run, candidates)
    assert rounds.order == expected and list(rounds.short) == ([0, 3] if asked == 4 else [1])
    assert set(rounds.zero_shot) == {0, 1, 2, 3, 4} and set(rounds.task) == set([1, 4, 0, 3][:asked])
    assert funnel._ranks({"a": 1, "b": 2, "c": 1}, lambda value: value) == {"a": 0, "b": 2, "c": 0}


def test_figures_are_of_the_models_they_name(data, config, monkeypatch):
    """Models are numbers here, and what is measured on one is its number."""
    run = SimpleNamespace(
        data=data, config=config, seed=1, config_of_parent=None, order=None, widths=None, teacher=1, mask=int,
        _loaded=lambda name, directory: {name: directory},
        closeness=lambda _, models: {name: Closeness(model, model / 10, 0, 100 * model)
                                     for name, model in models().items()})
    found = funnel.Funnel.measure(run, {"compressed": 4, "random": 5}, {"compressed": 2, "random": 3})
    kl = {"cut": 4, "compressed": 2, "random_cut": 5, "random": 3}
    bits = {"parent": 1, "compressed": 2, "random": 3, "compressed_cut": 4, "random_cut": 5}
    assert found == pytest.approx({f"kl_parent_{name}": model for name, model in kl.items()} | {
        "agreement_cut": 0.4, "agreement_compressed": 0.2, "agreement_random": 0.3} | {
        f"validation_bits_per_byte_{name}": 100 * model / 2 / math.log(2) for name, model in bits.items()})
    monkeypatch.setattr(funnel, "reverse_selection", lambda *_: 7)
    monkeypatch.setattr(funnel, "random_selection", lambda *drawn: 10 * drawn[-1].initial_seed())
    assert funnel.Funnel.controls(run, SimpleNamespace(config=None)) == {
        "reverse": 7, "random": [10, 20], "seeds": [1, 2]}


def test_sequences_are_taken_evenly():
    sequences = torch.arange(10)[:, None]
    assert evenly(sequences, 4).flatten().tolist() == [0, 2, 5, 7]
    assert evenly(sequences, 99).flatten().tolist() == list(range(10))


def test_a_kill_anywhere_changes_nothing(compress, planted, unbroken, tmp_path):
    class Killed(Exception):
        pass

    whole, short, steps = unbroken
    left = 0

    def kill_after_a_while(*_, **__):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    kills = 0
    while True:
        left = steps // 4 + kills           # falls into another piece each time
        try:
            resumed = compress(planted, short, tmp_path, kill_after_a_while)
            break
        except Killed:
            kills += 1
    assert kills >= 2 and (tmp_path / "scratch" / "resumed").exists()
    assert resumed.metrics == whole.metrics
    assert resumed.records == whole.records and resumed.curve == whole.curve
    for name, directory in whole.models.items():
        (_, one, _), (_, other, _) = load_weights(directory), load_weights(resumed.models[name])
        assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


@pytest.mark.parametrize("changes", [{"ffn_widths": [16, 48]}, {"learning_rate": 1e-3}])
def test_what_another_compression_kept_is_refused(compress, planted, config, tmp_path, changes):
    class Killed(Exception):
        pass

    def kill(*_, **__):
        raise Killed

    with pytest.raises(Killed):
        compress(planted, config, tmp_path, kill)
    name, = changes
    with pytest.raises(ModelError, match=rf"scratch: the state of another run: {name} .* and now .*\n"):
        compress(planted, config.model_copy(update=changes), tmp_path, kill)
    with pytest.raises(Killed):
        compress(planted, config.model_copy(update={"micro_batch_size": 2}), tmp_path, kill)


def test_results_kept_of_other_resets_are_refused(parent, tokens, data, config, tmp_path, monkeypatch):
    """Of documents that ended with their mark."""
    recipe = RECIPE.model_copy(update={"reset_at_documents": True})
    with process_groups(), pytest.raises(ModelError, match="documents begin None and now with the mark"):
        run = funnel.Funnel(parent.save(tmp_path), tokens, data, config, recipe, 1, ResultCache(tmp_path / "cache"),
                            silent)
        now = funnel.recipe_identity
        monkeypatch.setattr(funnel, "recipe_identity", lambda recipe: {
            name: value for name, value in now(recipe).items() if name != "documents begin"})
        run.check_identity()
        monkeypatch.undo()
        run.check_identity()


def test_a_pipeline_leaves_out_candidates_which_is_said_and_keeps_nothing_for_another(
        tokens, data, config, tmp_path, capsys):
    geometry = CONFIG.model_copy(update={"pattern": "M-M*-M-*"})
    parent = Weights(geometry, HybridLM(geometry).state_dict()).save(tmp_path)
    with process_groups():
        run = funnel.Funnel(parent, tokens, data, config, RECIPE, 1, ResultCache(tmp_path / "cache"), silent)
        run.check_identity()
        layers = [len(candidate.layers) for candidate in run.candidates()]
        assert "left out" not in capsys.readouterr().out
        run.parallelism = Parallelism(pipeline=2)
        even = [count for count in layers if count % 2 == 0]
        assert 0 < len(even) < len(layers) and [len(candidate.layers) for candidate in run.candidates()] == even
        said = capsys.readouterr().out
        assert f"{len(layers) - len(even)} of {len(layers)} candidates are left out: 2 pipeline stages" in said
        with pytest.raises(ModelError, match="pipeline None and now 2"):
            run.check_identity()


@pytest.mark.parametrize("pattern", ["M", "MMMM", "----", "M-"])
def test_a_latency_table_of_any_types_of_layers(config, tmp_path, monkeypatch, pattern):
    """And of one width: its overhead is fitted to five models, too."""
    parent = CONFIG.model_copy(update={"pattern": pattern})
    monkeypatch.setattr(latency, "step_seconds", lambda configs, *_: {
        name: 1e-3 + 1e-4 * len(one.pattern) for name, one in configs.items()})
    workload = latency.LatencyBudget(context=64, batch=1, decode_tokens=2, repeats=1)
    settings = config.model_copy(update={"latency": workload, "ffn_widths": [parent.ffn_hidden_size]})
    run = SimpleNamespace(config=settings, config_of_parent=parent, seed=1, progress=silent,
                          cache=ResultCache(tmp_path))
    with process_groups():
        table = funnel.Funnel.table.func(run)
    assert table.overhead == pytest.approx(1e-3) and list(table.layers.values()) == pytest.approx(
        [1e-4] * len(set(pattern)))


@pytest.mark.parametrize(("layout", "what"), [
    (Parallelism(tensor=2), r"num_query_groups \(1\) cannot be split over 2"),
    (Parallelism(pipeline=7), "none of")])
def test_a_layout_that_holds_no_candidate_is_refused_before_distillation(parent, tokens, data, config, tmp_path, layout,
                                                                         what):
    with process_groups():
        run = funnel.Funnel(parent.save(tmp_path), tokens, data, config, RECIPE, 1, ResultCache(tmp_path / "cache"),
                            silent)
        run.parallelism = layout
        with pytest.raises(ModelError, match=what) as error:
            run.candidates()
    assert len(str(error.value).splitlines()) == 2


def test_a_candidate_without_layers_in_fp8_is_refused_before_distillation(parent, tokens, data, config, tmp_path):
    short = config.model_copy(update=SHORT | {"precision": "fp8"})
    with process_groups():
        run = funnel.Funnel(parent.save(tmp_path), tokens, data, short, RECIPE, 1, ResultCache(tmp_path / "cache"),
                            silent)
        fewest = min((candidate.config.pattern for candidate in run.candidates()), key=len)
        run.school.pretrain = RECIPE.model_copy(update={"bf16_layers_at_start": len(fewest) - 1})
        found = rf"compress.precision fp8: a candidate of {fewest.count('M')} Mamba-2, .* pretrain.bf16_layers_at_start"
        with pytest.raises(ModelError, match=found) as error:
            run.candidates()
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("changes", [{"pattern": "M-M*M--"}, {"ffn_hidden_size": 32}])
def test_weights_of_another_model_are_refused_by_name(parent, tmp_path, changes):
    """model.json says another model than the weights are."""
    directory = parent.save(tmp_path)
    describe(directory, parent.config.model_copy(update=changes), {})
    config, _ = read_description(directory)
    with process_groups(), pytest.raises(ModelError, match=r"not the weights of .*decoder\.layers\.") as error:
        build_model(config, Precision("float32"), ONE_COPY, 1, start=directory)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("resets", [True, False])
def test_models_are_scored_with_the_resets_they_were_trained_with(parent, tokens, data, config, tmp_path, resets):
    """The state of the documents before is gone, or is not, as in training."""
    recipe = RECIPE.model_copy(update={"reset_at_documents": resets})
    ids = data.validation[:2, :-1].clone()
    ids[:, 10] = end_of_document(tokens)
    with process_groups():
        run = funnel.Funnel(parent.save(tmp_path), tokens, data, config, recipe, 1, ResultCache(tmp_path / "cache"),
                            silent, ONE_COPY)
        packed, alone = (next(run.teacher.hidden(part)) for part in (ids, ids[:, 10:]))
    assert (relative_error(packed[:, 10:], alone) < 1e-5) == resets
