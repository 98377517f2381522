"""Our models under lm-evaluation-harness, offline: an adapter for `HybridLM` and the tasks of the default corpus.

The harness (EleutherAI, 0.4) does what it is good at: requests, metrics, standard errors. `HarnessLM` answers its
requests with the numbers its own Hugging Face adapter gives, several times faster: choices that share a context are
scored in one pass, and logits are made only where they are asked for. The layers run in float32 on a CPU and in
bfloat16, as they were trained, on a GPU; logits are float32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, bootstrap_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tokenizers import Tokenizer
from torch import Tensor

from durable import read_checked, write_checked
from model import costs, hub, tensor_parallel
from model.config import ModelError
from model.evaluation.schema import ChoiceSample, Samples, TextSample
from model.hybrid_lm import HybridLM
from model.inference.caches import PrefixReader
from model.inference.decoder import Decoder
from model.inference.sampling import checked
from model.model_card import CardScore
from model.processes import ONE_PROCESS, TensorRanks

BATCH_TOKENS = {"cpu": 2048, "cuda": costs.EVALUATION_TOKENS}   # on a CPU, what stays in its cache is fastest
LENGTH_MULTIPLE = {"cpu": 1, "cuda": 128}           # on a GPU every other length is compiled or planned for anew
HEAD_ROWS = costs.EVALUATION_LOGITS                 # predictions whose logits, in float32, are there at one time
STEM_ROWS = {"cpu": 32, "cuda": 1}                  # rows that may share their context's pass; each has caches
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
STEM_SPREAD = 0.8               # shortest over longest in a batch: what stands behind the shortest is not shared
BOOTSTRAP_SAMPLES = 1000
SAMPLES_SHOWN = 5               # items a task in the samples
SHOWN_CHARACTERS = 500

Pair = tuple[list[int], list[int]]                  # tokens of the context, tokens to be scored after it
Score = tuple[float, bool]                          # log-likelihood in nats, whether each token was the likeliest


class Stem(NamedTuple):
    """Tokens that all of `rows` begin with. A row is indices of inputs that begin one another, the longest last:
    scoring it scores the others too, as the model is causal."""

    tokens: list[int]
    rows: list[list[int]]


class HarnessLM(TemplateLM):
    """A causal language model as the harness sees it.

    Args:
        model: the weights, on the device that is to run them.
        tokenizer: the exported tokenizer; text that spells a special token is encoded as text.
        end_ids: any of which ends a document.
        max_length: tokens of context a prediction may see; longer requests lose their beginning.
        choice_length: the same for choices and generation, where these may see more; otherwise `max_length`.
        scratch: directory for scores of finished batches; a later run with the same requests goes on from them.
        progress: `progress(step, total)`, counted in scored continuations or windows.
        ranks: the processes that the model is split over (`model.tensor_parallel`). Each must ask the same of its own
            adapter, in the same order; all get the same answers.
        begin_id: stands before a text's first token; None: the first of `end_ids`.

    Attributes:
        cut: texts, (context, continuation) or (prompt,), of the requests for choices and generation that were longer.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        end_ids: Sequence[int],
        max_length: int,
        choice_length: int | None = None,
        scratch: Path | None = None,
        progress: Callable[[int, int], None] = lambda step, total: None,
        ranks: TensorRanks = ONE_PROCESS,
        begin_id: int | None = None,
    ):
        super().__init__()
        self.model = model.eval()
        self._device = next(model.parameters()).device
        self.encoder = tokenizer
        self.encoder.encode_special_tokens = True
        self.max_length, self.choice_length = max_length, choice_length or max_length
        self.ranks, self.progress = ranks, progress
        self.scratch = None if ranks.tensor_rank else scratch
        self.cut: set[tuple[str, ...]] = set()
        self._ends, self._begin = end_ids, begin_id

    def within(self, tokens: int) -> HarnessLM:
        """The same model, whose choices and generation see at most `tokens` tokens of context."""
        other = copy.copy(self)
        other.choice_length, other.cut = min(tokens, self.choice_length), set()
        other.__dict__.pop("decoder", None)
        return other

    @property
    def eot_token_id(self) -> int:
        """The id that ends a document; the first where there are several."""
        return self._ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The id before a text's first token, as of the harness's adapter for transformers."""
        return self._ends[0] if self._begin is None else self._begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of `string`, no special ones among them."""
        return self.encoder.encode(string, add_special_tokens=False).ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """(log-likelihood in nats, greedy) of each request's continuation; the parent splits context from it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The likeliest text after each request's prompt, up to a stop sequence or its number of tokens.

        A prompt that leaves no room in `choice_length` for as many tokens loses its beginning. Raises ModelError where
        a request wants samples, or more tokens than fit at all.
        """
        answers = []
        for done, request in enumerate(requests, start=1):
            prompt, asked = request.args
            options = normalize_gen_kwargs(dict(asked))
            room = self.choice_length - options["max_gen_toks"]
            if options["do_sample"] or room < 1:
                raise ModelError(
                    f"A request wants {'samples' if options['do_sample'] else str(options['max_gen_toks']) + ' tokens'}"
                    f"; this adapter generates the likeliest text in {self.choice_length} tokens, prompt included.\n"
                    "Raise `evaluate.context_tokens`, or set `evaluate.generation` to none."
                )
            ids = self.tok_encode(prompt) or [self.prefix_token_id]
            if len(ids) > room:
                self.cut.add((prompt,))
            answers.append(self._likeliest(ids[-room:], options["max_gen_toks"], options["until"]))
            self.progress(done, len(requests))
        return answers

    @functools.cached_property
    def decoder(self) -> Decoder:
        """Caches of the model, made when something is first generated."""
        return Decoder(self.model, self.choice_length)

    def _likeliest(self, prompt: list[int], tokens: int, stops: Sequence[str]) -> str:
        """At most `tokens` tokens after `prompt`, cut before the first of `stops`."""
        chosen: list[int] = []
        text = ""
        for token in self.decoder.stream(torch.tensor([prompt], device=self._device), tokens):
            if checked(int(token)) in self._ends:
                break
            chosen.append(int(token))
            text = self.encoder.decode(chosen, skip_special_tokens=True)
            if any(stop and stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, in disjoint windows of `max_length` tokens."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._scores("rolling", windows, self.max_length), strict=True):
            totals[owner] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Score]:
        """A continuation longer than `choice_length` is scored in pieces of half of it, after what stands before."""
        self.cut |= {text for text, *ids in requests if sum(map(len, ids)) > self.choice_length + 1}
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, (_, context, continuation) in enumerate(requests):
            size = len(continuation)
            piece = size if size <= self.choice_length else self.choice_length // 2
            for start in range(0, size or 1, piece or 1):
                pairs.append((context + continuation[:start], continuation[start : start + piece]))
                owners.append(number)
        totals = [(0.0, True)] * len(requests)
        for owner, (score, greedy) in zip(owners, self._scores("choices", pairs, self.choice_length), strict=True):
            totals[owner] = (totals[owner][0] + score, totals[owner][1] and greedy)
        return totals

    def _scores(self, kind: str, pairs: Sequence[Pair], window: int) -> list[Score]:
        """Score of each pair in `window` tokens. Batches finished by an interrupted run are read from `scratch`."""
        if not all(context and continuation for context, continuation in pairs):
            raise ModelError("A request has no context or nothing to score.\nMend the task.")
        inputs = [(context + continuation)[-(window + 1) : -1] for context, continuation in pairs]
        stems = self._stems(inputs, [len(continuation) for _, continuation in pairs])
        scores: dict[int, Score] = {}
        asked = hashlib.sha256(json.dumps([window, pairs]).encode() if self.scratch else b"")
        for number, batch in enumerate(self._batches(stems, inputs)):
            asked.update(repr(batch).encode())              # other devices take other batches
            piece = self.scratch / f"{kind}-{number:06d}-{asked.hexdigest()[:12]}.json" if self.scratch else None
            if kept := self.ranks.of_first(piece and read_checked(piece)):
                finished = [(index, (score, greedy)) for index, score, greedy in json.loads(kept)]
                if piece:
                    piece.with_name("resumed").touch()
            else:
                finished = self._batch_scores(batch, inputs, pairs)
                if piece:
                    write_checked(piece, json.dumps([(index, *score) for index, score in finished]).encode())
            scores.update(finished)
            self.progress(len(scores), len(pairs))
        return [scores[index] for index in range(len(pairs))]

    def _stems(self, inputs: Sequence[list[int]], asked: Sequence[int]) -> list[Stem]:
        """All `inputs`, of each of which the last `asked` predictions count, the longest stem first.

        Inputs that begin one another become a row, rows that go on from one context a stem.
        """
        rows: list[list[int]] = []
        for index in sorted(range(len(inputs)), key=lambda index: inputs[index]):
            if rows and inputs[rows[-1][-1]] == inputs[index][: len(inputs[rows[-1][-1]])]:
                rows[-1].append(index)
            else:
                rows.append([index])
        stems: dict[tuple[int, ...], list[list[int]]] = {}
        for row in rows:
            context = inputs[row[-1]][: len(inputs[row[-1]]) - asked[row[-1]] + 1]
            stems.setdefault(tuple(context), []).append(row)
        most = STEM_ROWS[self._device.type]
        found = []
        for stem, together in stems.items():
            for first in range(0, len(together), most):
                members = together[first : first + most]
                found.append(Stem(list(stem) if len(members) > 1 else inputs[members[0][-1]], members))
        return sorted(found, key=lambda stem: (-len(stem.tokens), stem.rows))

    def _batches(self, stems: Sequence[Stem], inputs: Sequence[list[int]]) -> Iterator[list[Stem]]:
        """As many stems of about one length together as the device likes tokens; what rows share counts once."""
        batch: list[Stem] = []
        tokens = 0
        for stem in stems:
            size = len(stem.tokens) + sum(len(inputs[row[-1]]) - len(stem.tokens) for row in stem.rows)
            shorter = batch and len(stem.tokens) < STEM_SPREAD * len(batch[0].tokens)
            if shorter or (tokens and tokens + size > BATCH_TOKENS[self._device.type]):
                yield batch
                batch, tokens = [], 0
            batch.append(stem)
            tokens += size
        if batch:
            yield batch

    @torch.inference_mode()
    def _batch_scores(
        self, stems: list[Stem], inputs: Sequence[list[int]], pairs: Sequence[Pair]
    ) -> list[tuple[int, Score]]:
        """(index, score) of every pair in the batch. Raises ModelError for a score that is not finite."""
        asked: list[tuple[int, int, int]] = []          # row, position, the token that follows there
        lengths = []
        rows = [row for stem in stems for row in stem.rows]
        for place, row in enumerate(rows):
            for index in row:
                target, end = pairs[index][1], len(inputs[index])
                asked += zip([place] * len(target), range(end - len(target), end), target, strict=True)
                lengths.append(len(target))
        number, positions, targets = torch.tensor(asked, device=self._device).unbind(-1)
        hidden = self._hidden(stems, [inputs[row[-1]] for row in rows])[number, positions]
        head = self.model.lm_head.weight.float()
        found = [self._judged(some, head, following)
                 for some, following in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)]
        likelihoods, hits = (torch.cat(part).cpu().split(lengths) for part in zip(*found, strict=True))
        scores = [(part.sum().item(), bool(hit.all())) for part, hit in zip(likelihoods, hits, strict=True)]
        if not all(math.isfinite(score) for score, _ in scores):    # of choices, the first would count as the likeliest
            raise ModelError("A log-likelihood is not finite: activations overflow.\n"
                             "Check the weights, and that the tokenizer is the model's own.")
        return list(zip([index for row in rows for index in row], scores, strict=True))

    def _judged(self, hidden: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens, hidden) and the tokens that follow -> these' log-likelihoods, and whether each was the likeliest."""
        predicted = self.ranks.normalised(F.linear(hidden.float(), head))
        return self.ranks.at(predicted, targets), self.ranks.likeliest(predicted) == targets

    def _hidden(self, stems: list[Stem], rows: list[list[int]]) -> Tensor:
        """(rows, tokens, hidden) of all the stems' rows, before the head; what stands after a row's end is anything.

        Where rows share stems, these run once, as far as the shortest reaches, and the rows go on from copies of the
        caches. Rows are padded on the right: nothing before the pad sees it.
        """
        longest = max(map(len, rows))
        if len(rows) == len(stems):
            padded = longest + -longest % LENGTH_MULTIPLE[self._device.type]
            return self._backbone(_padded(rows, padded).to(self._device))
        shared = len(stems[-1].tokens)
        of_stem = torch.repeat_interleave(torch.tensor([len(stem.rows) for stem in stems]))
        reader = self._reader(longest, len(rows))
        begun = reader.read(_padded([stem.tokens[:shared] for stem in stems], shared))[of_stem]
        if longest == shared:
            return begun
        reader.fork(of_stem)
        return torch.cat([begun, reader.read(_padded([row[shared:] for row in rows], longest - shared))], 1)

    def _backbone(self, ids: Tensor) -> Tensor:
        """(rows, tokens) -> (rows, tokens, hidden), before the head."""
        return self.model.backbone(ids)

    def _reader(self, max_length: int, batch: int) -> PrefixReader:
        return PrefixReader(self.model, max_length, batch)


def _padded(rows: Sequence[list[int]], length: int) -> Tensor:
    """(rows, length) int64, zeros after a row's end."""
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def load(directory: Path, max_length: int, choice_length: int | None = None, **options: Any) -> HarnessLM:
    """The model and tokenizer of an exported Hub directory, on the GPU if there is one; split over the processes of
    this job, where there are several.

    Raises:
        ModelError: the directory's are not a model and tokenizer, cannot be split so, or the GPU is too small.
    """
    ranks, device = TensorRanks.of_job(), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        gpu, geometry = torch.cuda.get_device_properties(torch.cuda.current_device()), hub.read_config(directory)
        if wrong := costs.evaluation_refusal(
                str(directory), geometry, choice_length or max_length, ranks.tensor_ranks, gpu.total_memory, gpu.name):
            raise ModelError(wrong)
    config, state = hub.open_weights(directory)
    tokenizer = hub.check_vocabulary(directory, config.vocab_size)
    model = tensor_parallel.load(config, state, DTYPES[device], device, ranks)
    return HarnessLM(model, tokenizer, hub.end_ids(directory, config.vocab_size), max_length, choice_length,
                     ranks=ranks, begin_id=hub.begin_id(directory, config.vocab_size), **options)


class LocalTask(ConfigurableTask):
    """A task of the harness over rows in memory."""

    def __init__(self, config: dict[str, Any], rows: Sequence[Mapping[str, Any]]):
        self.rows = list(rows)
        super().__init__(config={**config, "test_split": "test", "target_delimiter": ""})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """The rows stand in for a data set: nothing is downloaded."""
        self.dataset = {"test": Dataset.from_list(self.rows)}


def text_task(name: str, rows: Sequence[Mapping[str, Any]]) -> LocalTask:
    """Bits per byte of rows with `text`."""
    metric = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    return LocalTask(
        {
            "task": name,
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [metric],
        },
        rows,
    )


def choice_task(name: str, rows: Sequence[Mapping[str, Any]]) -> LocalTask:
    """Accuracy at rows with `context`, `choices` and the index `answer`: the likeliest choice wins."""
    return LocalTask(
        {
            "task": name,
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        rows,
    )


@dataclass(frozen=True)
class Evaluation:
    """What a model made of the items.

    Attributes:
        metrics: flat figures.
        samples: for each task a few items with what the model made of them.
        scores: by item, in order: of `bits_per_byte_DOMAIN` (log-likelihood in nats, bytes), of a task 1 where right.
    """

    metrics: dict[str, float]
    samples: Samples
    scores: dict[str, list[Any]]


def evaluate(
    model: TemplateLM,
    texts: Mapping[str, Sequence[Mapping[str, Any]]],
    choices: Mapping[str, Sequence[Mapping[str, Any]]],
) -> Evaluation:
    """Run the harness over `texts[domain]` (rows of `text_task`) and `choices[task]` (rows of `choice_task`).

    Metrics: `bits_per_byte_DOMAIN` with `_stderr` (bootstrap over documents), `bits_per_byte` over all bytes,
    `TASK_accuracy` with `_stderr`; all but the overall one as the harness computes them. One document, or item, has no
    standard error. `TASK_cut` items, where there are any, have a context that lost its beginning: by the model's
    tokenizer it is longer than by that for which they were made.
    """
    domains = {f"bits_per_byte_{domain}": rows for domain, rows in texts.items()}
    tasks = {name: text_task(name, rows) for name, rows in domains.items()}
    tasks |= {name: choice_task(name, rows) for name, rows in choices.items()}
    outcome = harness_evaluate(model, {"tasks": tasks, "groups": {}}, bootstrap_iters=BOOTSTRAP_SAMPLES)
    results = outcome["results"]
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in outcome["samples"].items()}
    metrics: dict[str, float] = {}
    everything: list[tuple[float, int]] = []            # log-likelihood, bytes
    for name in domains:
        scored = [sample["bits_per_byte"] for sample in samples[name]]
        metrics[name] = float(results[name]["bits_per_byte,none"])
        if len(scored) > 1:
            metrics[f"{name}_stderr"] = bits_per_byte_stderr(scored)
        everything += scored
    metrics["bits_per_byte"] = bits_per_byte(everything)
    for name in choices:
        metrics[f"{name}_accuracy"] = float(results[name]["acc,none"])
        if len(samples[name]) > 1:
            metrics[f"{name}_accuracy_stderr"] = float(results[name]["acc_stderr,none"])
        metrics[f"{name}_items"] = len(samples[name])
        if cut := sum(not getattr(model, "cut", set()).isdisjoint(row["arguments"]) for row in samples[name]):
            metrics[f"{name}_cut"] = cut
    shown: Samples = {name: [_text_sample(sample) for sample in samples[name][:SAMPLES_SHOWN]] for name in domains}
    shown |= {name: [_choice_sample(sample) for sample in samples[name][:SAMPLES_SHOWN]] for name in choices}
    scores: dict[str, list[Any]] = {
        name: [[round(score, 4), size] for score, size in (row["bits_per_byte"] for row in samples[name])]
        for name in domains
    }
    scores |= {name: [int(row["acc"]) for row in samples[name]] for name in choices}
    return Evaluation(metrics, shown, scores)


def cut_contexts(metrics: Mapping[str, Any]) -> list[str]:
    """A line a task of `evaluate`'s figures with `_cut` items."""
    return [f"{task}: {metrics[key]} of {metrics[f'{task}_items']} contexts lost their beginning, which may hold the "
            "answer: by this model's tokenizer they are too long."
            for key in metrics if (task := key.removesuffix("_cut")) != key]


def card_scores(metrics: Mapping[str, Any]) -> list[CardScore]:
    """The model card's results from `evaluate`'s figures and their controls."""
    scores = []
    for key, value in metrics.items():
        if controls := [f"{metrics[f'{key}_{of}']:.3f}" for of in ("compressor", "control", "chance")
                        if f"{key}_{of}" in metrics]:
            scores.append(CardScore(key.replace("_", " "), value, metrics.get(f"{key}_stderr"), ", ".join(controls)))
    return scores


def bits_per_byte_stderr(scored: list[tuple[float, int]]) -> float:
    """By bootstrap over (log-likelihood in nats, bytes); the harness has one but does not apply it to bits per byte."""
    os.environ["DISABLE_MULTIPROC"] = "1"               # it would fork a pool for a millisecond's work
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return float(bootstrap_stderr(bits_per_byte, scored, iters=BOOTSTRAP_SAMPLES))


def _text_sample(sample: dict[str, Any]) -> TextSample:
    document = sample["doc"]
    figure = bits_per_byte([sample["bits_per_byte"]])
    return TextSample(id=document["id"], text=document["text"][:SHOWN_CHARACTERS], bits_per_byte=round(figure, 4))


def _choice_sample(sample: dict[str, Any]) -> ChoiceSample:
    document = sample["doc"]
    scores = [score for score, _ in sample["filtered_resps"]]
    return ChoiceSample(
        id=document["id"],
        context=document["context"][-SHOWN_CHARACTERS:],
        choices=document["choices"],
        log_likelihoods=[round(score, 4) for score in scores],
        answer=document["answer"],
        chosen=scores.index(max(scores)),
    )
