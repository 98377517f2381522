"""Counts of operations that several GPUs' figures are told in."""

import pytest

pytest.importorskip("triton", reason="`make test` installs Triton")

from benchmarks.parallel_gpu import nvidia_flops_per_token
from model.presets import PRESETS


def test_nvidias_count_gives_its_published_figure():
    """Nemotron-H-56B in FP8 on 128 H100 (NVIDIA/dgxc-benchmarking, 2fc17d4): 384 sequences of 8,192 in 11.874 s, 877
    TFLOP/s a GPU."""
    tokens = 384 * 8192 / 11.874 / 128
    assert tokens * nvidia_flops_per_token(PRESETS["nemotron_h_56b"]) == pytest.approx(877e12, abs=0.5e12)
