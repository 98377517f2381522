"""Geometry of the published models: Nemotron-H (paper Table 1, Figure 2) and what the paper measures against.

Pattern strings are those of NVIDIA's released configurations (Megatron-Bridge, NeMo). The paper's text gives the 47B
model 44 Mamba-2 and 49 FFN layers; the released weights have 45 and 48, and that is what stands here.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.costs import GatedTransformer


def nemotron_h_pattern(groups: int) -> str:
    """The paper's layer order: attention evenly spread (about 8%), Mamba-2 first, FFN last and after each attention."""
    return "M-" * 3 + "M*-M-M-M-M-" * groups + "M-"


_8B = ModelConfig(
    pattern=nemotron_h_pattern(4), hidden_size=4096, ffn_hidden_size=21504, num_attention_heads=32,
    num_query_groups=8, head_dim=128, mamba_num_heads=128, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8,
    sequence_length=8192, vocab_size=131072,
)
_56B = ModelConfig(
    pattern=nemotron_h_pattern(10), hidden_size=8192, ffn_hidden_size=32768, num_attention_heads=64,
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
        head_dim=128, position_embedding="rope", sequence_length=8192, vocab_size=131072,
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
