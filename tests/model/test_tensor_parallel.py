"""A model over two processes computes what it does in one: logits, scores, text and the benchmark's figures.

Referee is the whole model in one process. Geometries are drawn; the two processes draw the same ones.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model import hub
from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.lazy_state import LazyState, skeleton
from model.processes import TensorRanks, torch_processes
from model.tensor_parallel import connect, load, own, part_of
from tests.tiny_engine import run_processes

HERE = "tests.model.test_tensor_parallel"
WINDOW, WRITTEN = 48, 12
HYBRID = ModelConfig(
    pattern="M-*M-", hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, head_dim=8,
    mamba_num_heads=8, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=4, chunk_size=16, sequence_length=64,
    init_method_std=0.2, vocab_size=256,
)
TRANSFORMER = HYBRID.model_copy(update={"pattern": "*-*-", "position_embedding": "rope"})
PAIRS = [("def add(a, b):\n", "    return a + b\n"), ("def add(a, b):\n", "    return b\n"), ("", "no context"),
         ("x = 'é", "tude ☃'"), ("of a text that is longer than the window " * 3, "and its end")]
TEXTS = ["import json\n\n\ndef read(path):\n    return json.loads(path.read_text())\n" * 2, "short"]
PROMPTS = ["def add(a, b):", "x", "The quick brown fox jumps over the lazy dog, again and again and again."]


@st.composite
def geometries(draw: st.DrawFn) -> ModelConfig:
    """Models that two processes can split, with groups and heads of any number."""
    def even(most: int) -> int:
        return 2 * draw(st.integers(1, most))

    query_groups, mamba_groups = even(2), even(3)
    return ModelConfig(
        pattern="".join(draw(st.permutations("M*-"))) + draw(st.text("M*-", max_size=2)), hidden_size=even(20),
        ffn_hidden_size=even(30), num_query_groups=query_groups,
        num_attention_heads=query_groups * draw(st.integers(1, 3)), head_dim=even(4), mamba_num_groups=mamba_groups,
        mamba_num_heads=mamba_groups * draw(st.integers(1, 3)), mamba_head_dim=draw(st.integers(1, 8)),
        mamba_state_dim=draw(st.integers(1, 9)), conv_kernel=draw(st.integers(2, 5)),
        chunk_size=draw(st.integers(2, 9)), position_embedding=draw(st.sampled_from(["none", "rope"])),
        sequence_length=64, init_method_std=0.3, vocab_size=even(40),
    )


def whole(config: ModelConfig) -> HybridLM:
    """The same weights in every process; biases and vectors drawn too, so that none may be at the wrong place."""
    torch.manual_seed(11)
    model = HybridLM(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.2, 1.0)
    return model


def steps(model: HybridLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt read in pieces, then of the tokens after it one by one."""
    decoder = Decoder(model, ids.shape[1], len(ids), prefill_tokens=4)
    rows = [decoder.prefill(ids[:, :9])] + [decoder.decode(ids[:, i]) for i in range(9, ids.shape[1])]
    return torch.stack(rows, 1)


def misplaced(config: ModelConfig, state: dict[str, torch.Tensor], ranks: TensorRanks) -> HybridLM:
    """A part whose in_proj is half of the rows, whatever they are: what a plain row split would give."""
    parts = dict(own(config, state, ranks))
    for name in [name for name in parts if name.endswith("in_proj.weight")]:
        parts[name] = state[name].chunk(ranks.tensor_ranks)[ranks.tensor_rank]
    return connect(HybridLM.from_state(part_of(config, ranks), parts, torch.float64), config, ranks)


def check_a_drawn_model(config: ModelConfig, ranks: TensorRanks) -> None:
    reference = whole(config)
    state = {name: tensor.detach() for name, tensor in reference.state_dict().items()}
    ids = torch.randint(0, config.vocab_size, (2, 14), generator=torch.Generator().manual_seed(1))
    expected = reference.double()(ids)
    with torch.inference_mode():
        split = load(config, state, torch.float64, "cpu", ranks)
        torch.testing.assert_close(split(ids), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(steps(split, ids), expected[:, 8:], rtol=1e-5, atol=1e-5)
        logs = ranks.normalised(F.linear(reference.backbone(ids)[0], split.lm_head.weight))
        exact = expected[0].log_softmax(-1)
        torch.testing.assert_close(ranks.at(logs, ids[0]), exact.gather(-1, ids[0][:, None])[:, 0])
        assert torch.equal(ranks.likeliest(logs), exact.argmax(-1))
        wrong = misplaced(config, state, ranks)(ids)
        assert (wrong - expected).abs().max() > 1e-3 * expected.abs().max()


def check_that_only_parts_are_held(ranks: TensorRanks) -> None:
    """One whole tensor and the one before it are there at most, and of them no more than this process's part stays."""
    state, made, most = HybridLM(HYBRID).state_dict(), [], 0

    def make(name: str) -> torch.Tensor:
        nonlocal most
        tensor = state[name].clone()
        made.append(weakref.ref(tensor))
        most = max(most, sum(there() is not None for there in made))
        return tensor

    model = load(HYBRID, LazyState(skeleton(state), make), torch.float32, "cpu", ranks)
    assert len(made) == len(state) and most <= 2
    held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    norms = sum(state[name].nbytes for name in state if name.endswith((".norm.weight", "norm_f.weight"))
                and "mixer" not in name)
    assert held == (sum(tensor.nbytes for tensor in state.values()) - norms) / 2 + norms


def answers(directory: str, scratch: Path | None = None) -> dict[str, Any]:
    """All that evaluation asks of a model, and in how many batches the choices were scored."""
    from model.evaluation import harness
    from tests.model.evaluation.peers import requests

    model = harness.load(Path(directory), WINDOW, scratch=scratch)
    batches: list[int] = []
    scores = model._batch_scores
    model._batch_scores = lambda *args: batches.append(1) or scores(*args)          # type: ignore[method-assign]
    written = [(prompt, {"until": ["\n\n"], "max_gen_toks": WRITTEN, "do_sample": False}) for prompt in PROMPTS]
    return {
        "choices": model.loglikelihood(requests("loglikelihood", PAIRS)), "batches": len(batches),
        "rolling": model.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS])),
        "texts": model.generate_until(requests("generate_until", written)),
    }


def figures(ranks: TensorRanks) -> list[Any]:
    """What the benchmark says of a model in BF16 and, as of a published pair, of one with FP8 weights."""
    from model.benchmark.decode import measure
    from model.benchmark.serving import Size, serve
    from model.costs import Ceilings

    cpu, ceilings = torch.device("cpu"), Ceilings(1e9, 1e9, 1e9)
    [(row, _)] = measure({"tiny": HYBRID}, [32], 2, 4, 1, 32, 8, 0, torch.bfloat16, cpu, lambda *_, **__: None, ranks)
    wide = HYBRID.model_copy(update={"mamba_num_heads": 64, "ffn_hidden_size": 64, "mamba_num_groups": 2,
                                     "num_query_groups": 4})
    served = serve("tiny", wide, True, Size(32, 8, 2, 2, 2), cpu, ceilings, ranks)
    return [row.model_dump(), served._asdict()]


def job(directories: dict[str, str], scratch: str) -> dict[str, Any]:
    """Everything, in one of two processes."""
    from model.evaluation import harness

    with torch_processes():
        ranks = TensorRanks.of_job()
        seen: list[ModelConfig] = []

        @settings(max_examples=8, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
        @given(config=geometries())
        def drawn(config: ModelConfig) -> None:
            seen.append(config)
            check_a_drawn_model(config, ranks)

        drawn()
        check_that_only_parts_are_held(ranks)
        found: dict[str, Any] = {name: answers(directory) for name, directory in directories.items()}
        harness.BATCH_TOKENS["cpu"] = 32
        resumed = [answers(directories["hybrid"], Path(scratch))]
        if not ranks.tensor_rank:                   # which the second process never sees
            for piece in sorted(Path(scratch).glob("choices-*"))[::2]:
                piece.unlink()
        dist.barrier()
        resumed.append(answers(directories["hybrid"], Path(scratch)))
        return found | {"resumed": resumed, "figures": figures(ranks), "drawn": len(set(map(str, seen)))}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hub directories of two models of random weights, whose tokens are bytes."""
    root = tmp_path_factory.mktemp("hub")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, config in (("hybrid", HYBRID), ("transformer", TRANSFORMER)):
        hub.save(root / name, config, whole(config).state_dict(), {}, "float32")
        tokenizer.save(str(root / name / "tokenizer.json"))
    return {name: str(root / name) for name in ("hybrid", "transformer")}


def least_margin(directory: str) -> float:
    """Between the likeliest token and the next, over all that the prompts are gone on with."""
    model = HybridLM.from_state(*hub.load(directory))
    tokenizer = hub.check_vocabulary(Path(directory), 256)
    margins = []
    for prompt in PROMPTS:
        decoder = Decoder(model, WINDOW)
        logits = decoder.prefill(torch.tensor([tokenizer.encode(prompt).ids[-(WINDOW - WRITTEN):]]))
        for _ in range(WRITTEN - 1):
            first, second = logits[0].topk(2).values.tolist()
            margins.append(first - second)
            logits = decoder.decode(logits.argmax(-1))
    return min(margins)


def test_two_processes_compute_what_one_does(directories: dict[str, str], tmp_path: Path) -> None:
    expected = {name: answers(directory) for name, directory in directories.items()}
    alone = figures(TensorRanks())
    arguments = {"function": f"{HERE}.job", "directories": directories, "scratch": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    (found,) = run_processes(2, [arguments], tmp_path)
    assert found["drawn"] == 8
    first, second = found["resumed"]
    cases = [(found[name], expected[name]) for name in directories] + [(first, expected["hybrid"]), (second, first)]
    for got, wanted in cases:
        for kind in ("choices", "rolling"):
            assert torch.tensor(got[kind]).flatten().tolist() == pytest.approx(
                torch.tensor(wanted[kind]).flatten().tolist(), rel=1e-5, abs=1e-4)
        assert got["texts"] == wanted["texts"]
    assert min(map(least_margin, directories.values())) > 1e-3, "a rounding could choose another token"
    assert expected["hybrid"]["texts"] != expected["transformer"]["texts"]
    assert 1 < second["batches"] < first["batches"]
    for got, wanted in zip(found["figures"], alone, strict=True):
        assert got.keys() == wanted.keys()
        for name in ("cache_mib", "memory_gib", "batch", "weights_gib", "cache_gib_per_sequence"):
            assert got.get(name) == wanted.get(name)
        timed = got.keys() & {"tokens_per_second", "time_to_first_token_seconds", "step_milliseconds",
                              "time_to_first_token"}
        assert len(timed) == 2 and all(got[name] > 0 for name in timed)


@pytest.mark.parametrize(("ranks", "said"), [
    (8, r"num_attention_heads \(4\) cannot be split over 8"), (4, r"num_query_groups \(2\) cannot be split over 4"),
])
def test_heads_and_groups_that_do_not_divide(ranks: int, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        part_of(HYBRID, among(ranks))


@pytest.mark.parametrize("field", ["ffn_hidden_size", "vocab_size", "mamba_num_groups"])
def test_widths_that_do_not_divide(field: str) -> None:
    config = HYBRID.model_copy(update={"mamba_num_heads": 9, field: 9})
    fewer = config.model_copy(update={"mamba_num_heads": 18}) if field != "mamba_num_groups" else config
    with pytest.raises(ModelError, match=rf"{field} \(9\) cannot be split over 2 .*\n.* size that divides it"):
        part_of(fewer.model_copy(update={"mamba_num_heads": 18}), among(2))


def among(ranks: int) -> TensorRanks:
    """One of so many processes, which need not be there."""
    found = TensorRanks()
    found.tensor_ranks = ranks
    return found
