"""`python -m model.inference`, as a user runs it: the text it writes, and what it says of a directory that is wrong."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from model import hub
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference import text as text_generation
from model.inference.__main__ import main
from model.inference.text import Vocabulary, pieces
from tests.tiny_engine import random_model

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["<unk>", "<s>", "</s>", "<pad>", *BYTES, "t", "h", "e", "th", "the"]
CONFIG = ModelConfig(
    pattern="M*-M-", hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=1, head_dim=16,
    mamba_num_heads=16, mamba_head_dim=4, mamba_state_dim=16, mamba_num_groups=2, chunk_size=16, sequence_length=64,
    vocab_size=len(WORDS),
)
PROMPT = "the é"


def byte_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)},
                                     merges=[("t", "h"), ("th", "e")], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.fixture
def directory(tmp_path) -> Path:
    hub.save(tmp_path, CONFIG, random_model(CONFIG).state_dict(), {}, "float32")
    byte_tokenizer(WORDS).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def run(directory: Path, *options: str) -> int:
    return main(["--checkpoint", str(directory), "--prompt", PROMPT, "--device", "cpu", *options])


def greedy(directory: Path, tokens: int) -> str:
    """Through the full forward pass, token by token."""
    tokenizer = byte_tokenizer(WORDS)
    ids = [2, *tokenizer.encode(PROMPT).ids]
    assert len(ids) == 1 + 1 + 1 + 2                # the mark, `the`, a space, two bytes
    model = HybridLM.from_state(*hub.load(directory))
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return "".join(pieces(Vocabulary(tokenizer, 2, [2]), ids[5:]))


def test_greedy_text(directory, capsys):
    assert run(directory, "--max-new-tokens", "12") == 0
    found = capsys.readouterr()
    assert found.out == greedy(directory, 12) + "\n"
    assert "first piece after" in found.err


def test_any_of_several_ids_ends_a_text(directory):
    """As the chat models of the family have it: generation_config.json has a list."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for end_ids, ids, kept in (([2, 300], [258, 259, 300, 261], [258, 259]), ([], [258, 2], [258, 2])):
        text = tokenizer.decode(kept, skip_special_tokens=False)
        assert "".join(pieces(Vocabulary(tokenizer, 2, end_ids), iter(ids))) == text


def test_from_a_shell(directory):
    command = [sys.executable, "-m", "model.inference", "--checkpoint", str(directory), "--prompt", "-",
               "--max-new-tokens", "12", "--device", "cpu"]
    found = subprocess.run(command, input=PROMPT, capture_output=True, text=True, timeout=240)
    assert (found.returncode, found.stdout) == (0, greedy(directory, 12) + "\n"), found.stderr


def test_a_prompt_that_is_not_utf_8(directory, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    refuse(directory, "prompt: byte 3 is not UTF-8.\nGive the text in UTF-8.", capsys, monkeypatch, "--prompt", "-")


def test_a_seed_repeats_its_text(directory, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run(directory, "--temperature", "1.5", "--top-p", "0.95", "--top-k", "200", "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_smaller_weights(directory, capsys, monkeypatch):
    assert run(directory, "--dtype", "fp8", "--max-new-tokens", "5") == 1
    assert "Take --dtype bfloat16" in capsys.readouterr().err
    monkeypatch.setattr("model.inference.text.LEAST_WIDTH", 1)
    for dtype in ("bfloat16", "fp8"):
        assert run(directory, "--dtype", dtype, "--max-new-tokens", "5") == 0
        assert len(capsys.readouterr().out) > 1


def test_the_guides_example_runs(directory):
    guide = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    names: dict[str, torch.Tensor] = {}
    exec(code.replace("data/cpu/hub/hybrid-fp8", str(directory)), names)
    assert names["tokens"].shape == (4, 32) and names["tokens"].max() < len(WORDS)


def test_pieces_are_whole_characters_and_come_at_once():
    vocabulary = Vocabulary(byte_tokenizer(WORDS), 2, [2])
    ids = [WORDS.index("the"), *(4 + byte for byte in "é漢🙂!".encode()), 2, WORDS.index("the")]
    taken = []

    def tokens():
        for token in ids:
            taken.append(token)
            yield token

    found = pieces(vocabulary, tokens())
    assert next(found) == "the" and len(taken) == 1
    assert list(found) == ["é", "漢", "🙂", "!"]          # nothing after the end of text


def test_bytes_that_make_no_character_are_not_held_back():
    vocabulary = Vocabulary(byte_tokenizer(WORDS), 2, [2])
    assert "".join(pieces(vocabulary, [4 + 0xFF] * 5)) == "\ufffd" * 5
    assert "".join(pieces(vocabulary, [4 + 0xE6, 4 + 0xBC])) != ""


@pytest.mark.parametrize("decoder", [
    decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                       decoders.Strip(" ", 1, 0)]),
    decoders.Metaspace(prepend_scheme="always"),
], ids=["Llama's", "Metaspace"])
def test_blanks_stay_where_a_decoder_takes_the_first(decoder):
    tokenizer = byte_tokenizer([*WORDS, "\u2581the"])
    tokenizer.decoder = decoder
    blank, the = len(WORDS), WORDS.index("the")
    vocabulary = Vocabulary(tokenizer, 2, [2])
    assert list(pieces(vocabulary, [blank, the, blank])) == ["the", "the", " the"]
    assert list(pieces(vocabulary, [blank, blank], [the])) == [" the", " the"]


def test_a_character_behind_stray_bytes():
    letters = dict(zip([*b"!~", 0xF0, 0x9F, 0x99, 0x82], "!~ðŁĻĤ", strict=True))        # as GPT-2 writes bytes
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters.values())}, []))
    tokenizer.decoder = decoders.ByteLevel()
    ids = [list(letters).index(byte) for byte in b"\xf0\xf0\x9f\x99\x82!"]
    assert "".join(pieces(Vocabulary(tokenizer, None, []), ids)) == tokenizer.decode(ids) == "\ufffd🙂!"


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    state = {name: tensor for name, tensor in (load_file(path) | changes).items() if tensor is not None}
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("changes", "message"), [
    ({"backbone.layers.1.mixer.k_proj.weight": None}, "missing backbone.layers.1.mixer.k_proj.weight"),
    ({"backbone.layers.1.mixer.k_proj.bias": torch.zeros(16)}, "unexpected backbone.layers.1.mixer.k_proj.bias"),
    ({"lm_head.weight": torch.zeros(264, 32)}, "lm_head.weight is (264, 32), expected (265, 32)"),
])
def test_weights_that_do_not_fit(directory, changes, message, capsys, monkeypatch):
    change_tensors(directory, **changes)
    refuse(directory, message, capsys, monkeypatch)


def test_weights_whose_logits_are_no_numbers(directory, capsys):
    change_tensors(directory, **{"lm_head.weight": torch.full((265, 32), 3e38)})
    assert run(directory, "--max-new-tokens", "3") == 1
    found = capsys.readouterr()
    assert found.err.startswith("Logits are not finite: activations overflow.\n") and not found.out


@pytest.mark.parametrize(("content", "message"), [
    (None, "not found"), ("{", "not a tokenizer"),
    (byte_tokenizer([*WORDS, "more"]).to_str(), "a tokenizer of 266 ids, the model has 265"),
])
def test_tokenizers_that_do_not_fit(directory, content, message, capsys, monkeypatch):
    path = directory / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    refuse(directory, f"{path}: {message}", capsys, monkeypatch)


@pytest.mark.parametrize(("options", "message"), [
    (("--temperature", "-1"), "temperature is -1"), (("--top-p", "0"), "top_p is 0"),
    (("--top-k", "5"), "--top-k and --top-p: nothing is drawn at temperature 0"),
    (("--top-p", "0.9"), "--top-k and --top-p: nothing is drawn at temperature 0"),
    (("--max-new-tokens", "0"), "max_new_tokens is 0"), (("--seed", str(10**20)), "seed is 1000"),
    (("--prompt", "caf\udce9"), "prompt: byte 3 is not UTF-8"),
    (("--max-new-tokens", "100000"), "prompt: 5 tokens and 100000 new ones need 0.0"),
])
def test_options_without_a_meaning_or_without_room(directory, options, message, capsys, monkeypatch):
    monkeypatch.setattr(text_generation, "free_bytes", lambda device: 2**18)
    refuse(directory, message, capsys, monkeypatch, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(directory, capsys, monkeypatch):
    refuse(directory, "--device cuda: PyTorch has no GPU here.", capsys, monkeypatch, "--device", "cuda")


def test_a_file_in_place_of_a_directory(directory, capsys, monkeypatch):
    file = directory / "model.safetensors"
    refuse(file, f"{file}/config.json: not found.", capsys, monkeypatch)


def test_an_empty_prompt_needs_a_token_to_start_from(directory, capsys):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": None}))
    assert main(["--checkpoint", str(directory), "--prompt", "", "--device", "cpu"]) == 1
    assert "prompt: it is empty" in capsys.readouterr().err


def refuse(directory: Path, message: str, capsys, monkeypatch, *options: str) -> None:
    """It ends with the message and a second line, no text, and before the weights are read."""
    monkeypatch.setattr(hub, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert run(directory, *options) == 1
    found = capsys.readouterr()
    assert message in found.err and found.err.strip().count("\n") == 1 and not found.out


def test_a_blank_stays_behind_bytes():
    """Llama's decoder takes it off the first token, and bytes of a character are no token to stand behind."""
    tokenizer = byte_tokenizer([*WORDS, "\u2581the"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    vocabulary, blank, smile = Vocabulary(tokenizer, 2, [2]), len(WORDS), [4 + byte for byte in "🙂".encode()]
    assert list(pieces(vocabulary, [blank], smile)) == [" the"]
    stray = [4 + 0xFF] * text_generation.MOST_HELD
    assert "".join(pieces(vocabulary, [*stray, blank], [blank])) == "\ufffd" * len(stray) + " the"
