"""The SentencePiece tokenizer as tokenizer.json: the same ids for every text, in every loader of that format.

Exact because of how the tokenizer is trained: no normalisation, no dummy prefix, spaces kept, and no pre-tokenizer on
either side, so both apply the same merges to the whole text. `PreTrainedTokenizerFast` takes the file as it stands;
transformers' Llama class would rebuild the pipeline and lose the normalizer. `split_special_tokens` keeps text that
spells a control token text, as SentencePiece does. The model stands beside it: llama.cpp's converter takes pieces and
scores from it, and from tokenizer_config.json that nothing is put before a text (it would put a blank and `</s>`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from data_pipeline.tokenize.tokenizer import CONTROL, MODEL_FILE, NORMAL, SPACE, UNKNOWN, read_model


def export(model_path: Path, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for the SentencePiece model into `out`, and the model itself.

    The beginning-of-sequence token is `</s>`: in training a document follows the mark that ends the one before.

    Raises:
        DataError: the model has options that tokenizer.json would not repeat exactly.
    """
    model = read_model(model_path)
    tokenizer = build(model)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    shutil.copyfile(model_path, out / MODEL_FILE)
    eod = model.pieces[model.trainer_spec.eos_id].piece
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eod,
        "eos_token": eod,
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
        "pad_token": model.pieces[model.trainer_spec.pad_id].piece,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_prefix_space": False,
        "add_bos_token": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build(model: Any) -> Tokenizer:
    """The `tokenizers` twin of a SentencePiece BPE model with this project's options."""
    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(model),
            unk_token=model.pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order SentencePiece prefers them.

    SentencePiece merges the pair whose union has the best score and, among equals, the leftmost. A piece can have
    several splits, which share its score; `tokenizers` ranks them, the longer left half first, which is the split
    that a run of equal pieces merged from the left arrives at.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]
