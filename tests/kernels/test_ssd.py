"""chunk_scan against the recurrence it stands for, in float64, and against transformers' torch path."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from kernels.ssd import chunk_scan
from kernels.state_update import ssd_state_update
from tests.closeness import relative_error

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")


def inputs(
    batch: int, length: int, heads: int, head_dim: int, groups: int, state_dim: int, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Step sizes from 1e-3 to 3: decays from nearly none to complete within a chunk."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(batch, length, heads, head_dim),
        "dt": 2 * normal(batch, length, heads) - 2,
        "A": -torch.empty(heads, dtype=torch.float64).uniform_(1, 16, generator=generator),
        "B": normal(batch, length, groups, state_dim),
        "C": normal(batch, length, groups, state_dim),
        "D": normal(heads),
        "dt_bias": normal(heads) - 1,
        "initial_state": normal(batch, heads, head_dim, state_dim),
    }
    precise = torch.promote_types(dtype, torch.float32)
    sequences = ("x", "dt", "B", "C")
    return {name: value.to(dtype if name in sequences else precise) for name, value in values.items()}


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step a token: the definition."""
    heads_per_group = x.shape[2] // B.shape[2]
    step = F.softplus(dt + dt_bias)
    B, C = B.repeat_interleave(heads_per_group, 2), C.repeat_interleave(heads_per_group, 2)
    state, outputs = initial_state, []
    for t in range(x.shape[1]):
        added = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * torch.exp(step[:, t] * A)[..., None, None] + added
        outputs.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def gradients(outputs: Iterable[Tensor], values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed random combination of the outputs, in every input."""
    generator = torch.Generator().manual_seed(1)
    weighted = [(y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum(dtype=torch.float64) for y in outputs]
    return torch.autograd.grad(torch.stack(weighted).sum(), list(values.values()))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("length, chunk, groups", [(96, 32, 2), (100, 32, 1), (7, 16, 4), (33, 16, 2), (1, 8, 2)])
def test_values_and_gradients_equal_the_recurrence(dtype, tolerance, length, chunk, groups):
    ours = {k: v.requires_grad_() for k, v in inputs(2, length, 4, 8, groups, 16, dtype).items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in ours.items()}
    y, state = chunk_scan(*(ours[name] for name in NAMES[:7]), chunk, ours["initial_state"])
    y_exact, state_exact = recurrence(**exact)
    assert y.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(y, y_exact) < tolerance
    assert relative_error(state, state_exact) < min(tolerance, 1e-4)     # the state stays float32 for bfloat16 inputs
    for name, mine, true in zip(NAMES, gradients((y, state), ours), gradients((y_exact, state_exact), exact),
                                strict=True):
        assert relative_error(mine, true) < tolerance, name


def test_gradcheck():
    values = {k: v.requires_grad_() for k, v in inputs(1, 5, 2, 2, 1, 3, torch.float64).items()}

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunk_scan(*tensors[:7], 2, tensors[7])

    assert torch.autograd.gradcheck(scan, tuple(values[name] for name in NAMES))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_transformers(groups):
    values = inputs(2, 75, 4, 8, groups, 16, torch.float32)
    state = values.pop("initial_state")
    y, last = chunk_scan(**values, chunk_size=16, initial_state=state)
    A, D, dt_bias = (values.pop(name) for name in ("A", "D", "dt_bias"))
    theirs, theirs_last = mamba2_chunk_scan(
        values["x"], values["dt"], A, values["B"], values["C"], chunk_size=25, D=D, dt_bias=dt_bias,
        initial_states=state, dt_softplus=True, return_final_states=True,
    )
    assert relative_error(y, theirs) < 1e-5 and relative_error(last, theirs_last) < 1e-5


def test_a_split_sequence_gives_the_same():
    """The state carries over, at a cut that is no multiple of the chunk, in chunks of another size."""
    values = inputs(2, 50, 4, 8, 2, 16, torch.float64)
    state = values.pop("initial_state")
    whole, last = chunk_scan(**values, chunk_size=16, initial_state=state)
    pieces = []
    for part, chunk in ((slice(0, 19), 8), (slice(19, 50), 32)):
        cut = {k: v[:, part] if k in ("x", "dt", "B", "C") else v for k, v in values.items()}
        y, state = chunk_scan(**cut, chunk_size=chunk, initial_state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


def test_without_initial_state_starts_from_zero():
    values = inputs(2, 20, 4, 8, 2, 16, torch.float32)
    zero = torch.zeros_like(values.pop("initial_state"))
    assert torch.equal(chunk_scan(**values, chunk_size=8)[0], chunk_scan(**values, chunk_size=8, initial_state=zero)[0])


@pytest.mark.parametrize("shift", [-200.0, 50.0])
def test_extreme_steps_stay_finite(shift):
    """Steps that underflow to zero (nothing enters) and steps that erase the state at once."""
    values = {k: v.requires_grad_() for k, v in inputs(1, 40, 2, 4, 1, 4, torch.float32).items()}
    y, state = chunk_scan(*(values[name] for name in NAMES[:6]), values["dt_bias"] + shift, 16, values["initial_state"])
    grads = gradients((y, state), values)
    assert all(tensor.isfinite().all() for tensor in (y, state, *grads))
    exact = {k: v.detach().double() for k, v in values.items()}
    y_exact, state_exact = recurrence(**(exact | {"dt_bias": exact["dt_bias"] + shift}))
    assert relative_error(y, y_exact) < 1e-5 and relative_error(state, state_exact) < 1e-5


@pytest.mark.parametrize("step, tolerance", [(10.0, 1e-5), (2000.0, 2e-3)])
def test_what_follows_a_step_that_erases_the_state(step, tolerance):
    """Decays within a chunk are differences of prefix sums: after a step beyond any real one they keep three digits."""
    values = inputs(1, 64, 2, 4, 1, 8, torch.float32)
    values["dt"].fill_(-7)              # steps of 1e-3
    values["dt"][:, 10] = step
    values |= {"A": torch.tensor([-16.0, -1.0]), "dt_bias": torch.zeros(2)}
    y, state = chunk_scan(*(values[name] for name in NAMES[:7]), 32, values["initial_state"])
    y_exact, state_exact = recurrence(**{name: value.double() for name, value in values.items()})
    assert relative_error(y, y_exact) < tolerance and relative_error(state, state_exact) < tolerance


def test_state_update_follows_the_scan():
    values = inputs(2, 30, 4, 8, 2, 16, torch.float32)
    state = values.pop("initial_state")
    y, last = chunk_scan(**values, chunk_size=8, initial_state=state)
    A, D, dt_bias = values["A"], values["D"], values["dt_bias"]
    steps = [ssd_state_update(state, values["x"][:, t], values["dt"][:, t], A, values["B"][:, t], values["C"][:, t], D,
                              dt_bias) for t in range(30)]
    assert relative_error(torch.stack(steps, 1), y) < 1e-5 and relative_error(state, last) < 1e-5


# Documents of a packed sequence of 50 tokens, by chunks of 16: boundaries inside and at the edges of chunks, a document
# over several chunks, one of a single token, none that changes.
LENGTHS = [(1, 15, 3, 13, 1, 17), (16, 16, 2, 2, 14), (5, 40, 5), (50,)]


def documents(lengths: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 6e-3)])
def test_packed_documents_are_the_recurrence_of_each(dtype, tolerance):
    ours = {k: v.requires_grad_() for k, v in inputs(len(LENGTHS), 50, 4, 8, 2, 16, dtype).items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in ours.items()}
    seq_idx = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]).int()
    y, state = chunk_scan(*(ours[name] for name in NAMES[:7]), 16, ours["initial_state"], seq_idx)
    y_rows, last = [], []
    for row, lengths in enumerate(LENGTHS):
        pieces, carried = [], exact["initial_state"][row : row + 1]
        for part in documents(lengths):
            cut = {k: v[row : row + 1, part] if k in ("x", "dt", "B", "C") else v for k, v in exact.items()}
            piece, carried = recurrence(**(cut | {"initial_state": carried}))
            pieces.append(piece)
            final, carried = carried, torch.zeros_like(carried)
        y_rows.append(torch.cat(pieces, 1))
        last.append(final)
    y_exact, state_exact = torch.cat(y_rows), torch.cat(last)
    assert relative_error(y, y_exact) < tolerance
    assert relative_error(state, state_exact) < min(tolerance, 1e-4)
    for name, mine, true in zip(NAMES, gradients((y, state), ours), gradients((y_exact, state_exact), exact),
                                strict=True):
        assert relative_error(mine, true) < tolerance, name


def test_one_document_is_no_document():
    values = inputs(2, 50, 4, 8, 2, 16, torch.float32)
    whole = chunk_scan(**values, chunk_size=16)
    for packed, plain in zip(chunk_scan(**values, chunk_size=16, seq_idx=torch.full((2, 50), 7, dtype=torch.int32)),
                             whole, strict=True):
        assert torch.equal(packed, plain)
