"""What is cut must not have mattered: exact where the structure says so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import costs
from model.checkpoint import open_weights, save_weights
from model.compression.prune import Selection, cut, cut_checkpoint
from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM
from tests.closeness import relative_error
from tests.model.compression.markov import CONFIG

EVERY = {index: torch.arange(48) for index in (1, 4, 6)}


def logits(config: ModelConfig, state, ids):
    with torch.no_grad():
        return HybridLM.from_state(config, state, dtype=torch.float64)(ids)


def test_cutting_nothing_changes_nothing(parent, data):
    config, state = cut(*parent, Selection(range(7), EVERY))
    assert config == parent.config and state.keys() == parent.state.keys()
    assert all(torch.equal(state[name], parent.state[name]) for name in state)


def test_a_transformer_has_no_mamba_widths_to_keep():
    config = CONFIG.model_copy(update={"pattern": "*-*-", "mamba_num_heads": 0})
    whole = HybridLM(config).state_dict()
    smaller, state = cut(config, whole, Selection([2, 3]))
    assert smaller == config.model_copy(update={"pattern": "*-"})
    for name in ("mixer.up_proj.weight", "norm.weight"):
        assert torch.equal(state[f"backbone.layers.1.{name}"], whole[f"backbone.layers.3.{name}"])


def dead_mamba(state, layer, heads=(), channels=()):
    """Heads, and channels of every head, whose gate is shut: nothing of them reaches the gated norm."""
    gate = state[f"backbone.layers.{layer}.mixer.in_proj.weight"][:64].view(4, 16, -1)
    for head in heads:
        gate[head] = 0
    for channel in channels:
        gate[:, channel] = 0


def test_cutting_dead_mamba_channels_is_exact(parent, data):
    state = {name: tensor.double() for name, tensor in parent.state.items()}
    channels = {layer: torch.arange(4, 16) for layer in (0, 2, 5)}
    for layer in channels:
        dead_mamba(state, layer, channels=range(4))
    before = logits(parent.config, state, data.calibration[:4])
    config, smaller = cut(parent.config, state, Selection(range(7), mamba_channels=channels))
    assert config.mamba_head_dim == 12
    assert relative_error(logits(config, smaller, data.calibration[:4]), before) < 1e-10


def test_all_axes_at_once_are_exact_where_dead(parent, data):
    """Heads, neurons and whole layers. The gated norms lose channels and those of the residual stream none, under one
    epsilon: with the norms' weights or the epsilon as they were it would not be exact."""
    state = {name: tensor.double() for name, tensor in parent.state.items()}
    heads = {0: torch.tensor([0, 2]), 2: torch.tensor([1, 3]), 5: torch.tensor([1, 2])}
    for layer, kept in heads.items():
        dead_mamba(state, layer, [head for head in range(4) if head not in kept])
    for name in ("3.mixer.o_proj", "4.mixer.down_proj"):
        state[f"backbone.layers.{name}.weight"].zero_()
    neurons = {1: torch.arange(40), 6: torch.arange(8, 48)}
    for layer, kept in neurons.items():
        state[f"backbone.layers.{layer}.mixer.up_proj.weight"][[n for n in range(48) if n not in kept]] = 0
    before = logits(parent.config, state, data.calibration[:4])
    config, smaller = cut(parent.config, state, Selection([0, 1, 2, 5, 6], neurons, heads))
    assert (config.pattern, config.ffn_hidden_size, config.mamba_num_heads) == ("M-MM-", 40, 2)
    assert config.norm_epsilon == 2 * parent.config.norm_epsilon
    assert sum(tensor.numel() for tensor in smaller.values()) == costs.parameters(config)
    assert relative_error(logits(config, smaller, data.calibration[:4]), before) < 1e-10
    same = config.model_copy(update={"norm_epsilon": parent.config.norm_epsilon})
    assert relative_error(logits(same, smaller, data.calibration[:4]), before) > 1e-5
    sliced = {name: tensor / 2**0.5 if name.endswith("mixer.norm.weight") else tensor
              for name, tensor in smaller.items()}
    assert relative_error(logits(config, sliced, data.calibration[:4]), before) > 1e-2


@pytest.mark.parametrize(("order", "same"), [([1, 0, 3, 2], True), ([2, 1, 0, 3], False)])
def test_mamba_heads_may_change_places_within_their_group_alone(parent, data, order, same):
    """A permutation is a cut that keeps everything, in another order; groups are heads 0, 1 and 2, 3."""
    state = {name: tensor.double() for name, tensor in parent.state.items()}
    channels = (torch.tensor(order)[:, None] * 16 + torch.arange(16)).flatten()
    states = torch.arange(64, 64 + 2 * 2 * 8)
    convolved = torch.cat([channels, states])
    rows = torch.cat([channels, 64 + convolved, 64 + 64 + 32 + torch.tensor(order)])
    permuted = dict(state)
    for name, kept in {"in_proj.weight": rows, "conv1d.weight": convolved, "conv1d.bias": convolved, "A_log": order,
                       "D": order, "dt_bias": order, "norm.weight": channels}.items():
        permuted[f"backbone.layers.2.mixer.{name}"] = state[f"backbone.layers.2.mixer.{name}"][kept]
    out = "backbone.layers.2.mixer.out_proj.weight"
    permuted[out] = state[out][:, channels]
    before, after = (logits(parent.config, s, data.calibration[:4]) for s in (state, permuted))
    assert relative_error(after, before) < 1e-10 if same else relative_error(after, before) > 1e-3


@pytest.mark.parametrize(("layer", "kept", "message"), [
    (0, [0, 1, 2], r"must keep as many; got \[3\]"), (0, [0, 1, 3], r"must keep as many; got \[2, 1\]"),
    (0, [0, 3, 4], r"must keep as many; got \[1, 2\]"), (1, [0, 3], "mamba_num_heads: layer 1 has none"),
])
def test_heads_go_evenly_from_every_group(parent, layer, kept, message):
    """Groups are heads 0, 1, 2 and 3, 4, 5."""
    config = parent.config.model_copy(update={"mamba_num_heads": 6})
    with pytest.raises(ValueError, match=message):
        cut(config, parent.state, Selection([0, 1], mamba_heads={layer: torch.tensor(kept)}))


@pytest.mark.parametrize(("layers", "neurons"), [
    ([1, 0], {1: torch.arange(8)}), ([0, 0, 1], {1: torch.arange(8)}), ([1], {1: torch.tensor([3, 2])}),
    ([1], {1: torch.tensor([3, 3])}), ([1, 4], {1: torch.arange(8), 4: torch.arange(9)}),
    ([], {}), ([-1, 1], {}), ([1, 7], {}), ([1], {1: torch.tensor([], dtype=torch.int64)}),
    ([1], {1: torch.tensor([-1, 3])}), ([1], {1: torch.tensor([48])}), ([0, 1], {0: torch.arange(8)}),
    ([1, 4], {1: torch.arange(8)}), ([1], {7: torch.arange(8)}),
])
def test_indices_are_the_models_and_ascend_and_widths_agree(parent, layers, neurons):
    with pytest.raises(ValueError):
        cut(*parent, Selection(layers, neurons))


def drawn_selection(data: st.DataObject) -> Selection:
    """Some layers of CONFIG, and of every layer of a type as many units, spread evenly over the groups."""
    def of_each(layers: list[int], count: int) -> dict:
        size = data.draw(st.integers(1, count))
        kept = st.permutations(range(count)).map(lambda order: torch.tensor(sorted(order[:size])))
        return {layer: data.draw(kept) for layer in layers} if data.draw(st.booleans()) else {}

    layers = sorted(data.draw(st.sets(st.integers(0, 6), min_size=1)))
    by_type = {symbol: [layer for layer in layers if CONFIG.pattern[layer] == symbol] for symbol in "M*-"}
    heads = data.draw(st.sampled_from([[0, 2], [1, 3], [0, 1, 2, 3]]))
    return Selection(
        layers, neurons=of_each(by_type["-"], 48), mamba_heads={layer: torch.tensor(heads) for layer in by_type["M"]},
        mamba_channels=of_each(by_type["M"], 16),
    )


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_cutting_tensor_by_tensor_on_disk_is_cutting_in_memory(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("cut")
    (directory / "parent").mkdir()
    (directory / "out").mkdir()
    torch.manual_seed(4)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    state = {name: torch.randn_like(tensor).to(dtype) for name, tensor in HybridLM(CONFIG).state_dict().items()}
    selection = drawn_selection(data)
    save_weights(directory / "parent", CONFIG, state, {"tokens": 1})
    config, expected = cut(CONFIG, state, selection)
    assert cut_checkpoint(directory / "parent", directory / "out", selection, {"tokens": 2}) == config
    stored_config, stored, training = open_weights(directory / "out")
    assert stored_config == config and stored.keys() == expected.keys() and training == {"tokens": 2}
    for name, tensor in expected.items():
        assert stored[name].dtype is dtype and torch.equal(stored[name], tensor), name


def test_a_lazy_state_is_cut_when_it_is_read(parent, tmp_path):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.1.mixer.up_proj.weight"][0] = torch.inf
    save_weights(tmp_path, parent.config, state, {})
    _, smaller = cut(parent.config, open_weights(tmp_path)[1], Selection(range(7), {1: torch.arange(20, 40)} | {
        layer: torch.arange(20) for layer in (4, 6)}))
    assert smaller["backbone.layers.4.mixer.up_proj.weight"].shape == (20, 32)
    with pytest.raises(ModelError, match="not finite"):
        smaller["backbone.layers.1.mixer.up_proj.weight"]
