"""Counts of operations that several GPUs' figures are told in."""

import sys

import pytest

pytest.importorskip("triton", reason="`make test` installs Triton")

from benchmarks import parallel_gpu, step_gpu
from benchmarks.parallel_gpu import nvidia_flops_per_token
from model.presets import PRESETS


def test_nvidias_count_gives_its_published_figure():
    """Nemotron-H-56B in FP8 on 128 H100 (NVIDIA/dgxc-benchmarking, 2fc17d4): 384 sequences of 8,192 in 11.874 s, 877
    TFLOP/s a GPU."""
    tokens = 384 * 8192 / 11.874 / 128
    assert tokens * nvidia_flops_per_token(PRESETS["nemotron_h_56b"]) == pytest.approx(877e12, abs=0.5e12)


@pytest.mark.parametrize(("benchmark", "option", "given"), [
    (parallel_gpu, "kernels", "captured,capture"), (parallel_gpu, "precisions", "fp16"), (step_gpu, "only", "222m,8"),
    (step_gpu, "kernels", "captured"), (step_gpu, "precisions", "bf16,fp16")])
def test_no_row_is_called_what_was_not_measured(monkeypatch, capsys, benchmark, option, given):
    """Any other kernels than stock's were ours, under the name that was given; any precision but FP8 was BF16."""
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, f"--{option}", given])
    monkeypatch.setattr(parallel_gpu, "steps_of_layouts", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert f"--{option}: {given.split(',')[-1]} is none of" in capsys.readouterr().err
