"""Where documents end in a packed sequence, on its way through Megatron's layers to the mixers and to attention.

Off in the paper: its samples run over document boundaries. With `pretrain.reset_at_documents` scan, convolution and
attention restart at every end-of-document token, so that each document is computed as if it stood alone behind it, as
texts do that are evaluated and served. Rotary positions count on: attention sees only their differences, and these are
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(kw_only=True)
class PackedDocuments(PackedSeqParams):
    """Megatron's `packed_seq_params` of a batch in its usual (sequence, batch) layout.

    Attributes:
        seq_idx: (batch, sequence) int32, the number of the document a token belongs to, rising in each sequence.
    """

    seq_idx: Tensor

    @cached_property
    def attention_mask(self) -> Tensor:
        """(batch, 1, sequence, sequence) bool: true where a query sees a key, earlier and in the same document. Made
        once for all layers."""
        same = self.seq_idx[:, :, None] == self.seq_idx[:, None, :]
        return same.tril_()[:, None]


def find_documents(input_ids: Tensor, eod_id: int) -> PackedDocuments:
    """The documents of input_ids (batch, sequence); an end-of-document token is the first of the next, which follows
    it. Were it the last of its own, no token but the first of a document would ever have been predicted behind it."""
    length = input_ids.shape[1]
    return PackedDocuments(qkv_format="sbhd", max_seqlen_q=length, max_seqlen_kv=length,
                           seq_idx=(input_ids == eod_id).cumsum(1).int())
