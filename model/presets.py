"""Geometry of the published models: Nemotron-H (paper Table 1, Figure 2) and what the paper measures against; patterns
of new hybrids by the same rules, and the Transformer that matches a hybrid.

Pattern strings are those of NVIDIA's released configurations (Megatron-Bridge, NeMo). The paper's text gives the 47B
model 44 Mamba-2 and 49 FFN layers; the released weights have 45 and 48, and that is what stands here.
"""

from __future__ import annotations

from model import costs
from model.config import ModelConfig, ModelError
from model.costs import GatedTransformer

ATTENTION_SHARE = 0.08          # of the layers: where validation loss was lowest (arXiv 2406.07887, section 3.3)
FFN_STEP = 16                   # FFN widths are multiples of it, for FP8
MAMBA_FIELDS = ("mamba_", "conv_kernel", "chunk_size")


def hybrid_pattern(layers: int, attention_share: float = ATTENTION_SHARE) -> str:
    """The layer order of a new hybrid by the paper's rules (section 2.1): 52 give the 8B model's, 118 the 56B's.

    About `attention_share` of the layers are attention, at least one; the rest are as many Mamba-2 as FFN layers. These
    alternate from a Mamba-2 layer to an FFN layer, and attention always stands between such a pair. It is spread
    evenly: it cuts the Mamba-2 layers into runs that differ in length by at most one, the short ones first.

    Raises:
        ModelError: too few layers for a Mamba-2 layer on each side of every attention layer.
    """
    attention = layers % 2 + 2 * round((attention_share * layers - layers % 2) / 2)     # what is left is even
    attention = max(attention, 2 - layers % 2)
    pairs = (layers - attention) // 2
    if pairs <= attention:
        raise ModelError(
            f"pattern: {layers} layers with {attention} of attention leave {max(pairs, 0)} pairs of Mamba-2 and FFN, "
            f"fewer than {attention + 1}.\nTake more layers, an odd number of them, or a smaller attention share."
        )
    length, longer = divmod(pairs, attention + 1)
    runs = [length] * (attention + 1 - longer) + [length + 1] * longer
    return "*-".join("M-" * (run - 1) + "M" for run in runs) + "-"


def matched_transformer(hybrid: ModelConfig, blocks: int | None = None) -> ModelConfig:
    """The Transformer a hybrid is compared with: its parameters, vocabulary, residual width and attention heads, RoPE.

    Every block is attention and FFN, `*-`. Unless `blocks` says how many, they are so many that the FFN can keep about
    the hybrid's width (as in Nemotron-T-8B); its width is then the multiple of 16 that comes closest to the hybrid's
    parameters.

    Raises:
        ModelError: attention alone in so many blocks has more parameters than the hybrid.
    """
    body = sum(costs.layer_parameters(hybrid, symbol) for symbol in hybrid.pattern)
    attention = costs.layer_parameters(hybrid, "*")
    if blocks is None:
        blocks = max(1, round(body / (attention + costs.layer_parameters(hybrid, "-"))))
    ffn_parameters = body / blocks - attention - hybrid.hidden_size      # an FFN layer has a norm of hidden_size
    ffn_hidden_size = FFN_STEP * round(ffn_parameters / (2 * hybrid.hidden_size) / FFN_STEP)
    if ffn_hidden_size < FFN_STEP:
        raise ModelError(
            f"transformer: attention of {blocks} blocks leaves no parameters of {body} for their FFN layers.\n"
            f"Ask for fewer blocks than {int(body / attention)}."
        )
    mamba = {name: field.default for name, field in ModelConfig.model_fields.items() if name.startswith(MAMBA_FIELDS)}
    changes = {"pattern": "*-" * blocks, "ffn_hidden_size": ffn_hidden_size, "position_embedding": "rope"}
    return hybrid.model_copy(update=mamba | changes)


_8B = ModelConfig(
    pattern=hybrid_pattern(52), hidden_size=4096, ffn_hidden_size=21504, num_attention_heads=32,
    num_query_groups=8, head_dim=128, mamba_num_heads=128, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8,
    init_method_std=0.014, sequence_length=8192, vocab_size=131072,
)
_56B = ModelConfig(
    pattern=hybrid_pattern(118), hidden_size=8192, ffn_hidden_size=32768, num_attention_heads=64,
    num_query_groups=8, head_dim=128, mamba_num_heads=256, mamba_head_dim=64, mamba_state_dim=256, mamba_num_groups=8,
    init_method_std=0.0099, sequence_length=8192, vocab_size=131072,
)
_47B_PATTERN = (
    "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
)

PRESETS: dict[str, ModelConfig] = {
    "nemotron_h_4b": _8B.model_copy(update={"hidden_size": 3072, "ffn_hidden_size": 12288, "mamba_num_heads": 112}),
    "nemotron_h_8b": _8B,
    "nemotron_h_47b": _56B.model_copy(update={"pattern": _47B_PATTERN, "ffn_hidden_size": 30720}),
    "nemotron_h_56b": _56B,
    # Nemotron-T-8B, the Transformer the paper trains on the same data.
    "nemotron_t_8b": ModelConfig(
        pattern="*-" * 32, hidden_size=4096, ffn_hidden_size=21504, num_attention_heads=32, num_query_groups=8,
        head_dim=128, position_embedding="rope", init_method_std=0.014, sequence_length=8192, vocab_size=131072,
    ),
}

# Throughput peers of the paper's Figures 1 and 12, from their published configurations.
PEERS: dict[str, GatedTransformer] = {
    "llama_3_2_3b": GatedTransformer(28, 3072, 8192, 24, 8, 128, 128_256, tied_embeddings=True),
    "llama_3_1_8b": GatedTransformer(32, 4096, 14336, 32, 8, 128, 128_256),
    "llama_3_1_70b": GatedTransformer(80, 8192, 28672, 64, 8, 128, 128_256),
    "qwen_2_5_7b": GatedTransformer(28, 3584, 18944, 28, 4, 128, 152_064, qkv_bias=True),
    "qwen_2_5_72b": GatedTransformer(80, 8192, 29568, 64, 8, 128, 152_064, qkv_bias=True),
}
