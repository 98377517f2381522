"""What the compiler made of the scan's kernels, Hopper's own and the others: compiled for Hopper without a GPU, read.

    python -m benchmarks.kernels_machine_code [--sizes 16,32,64,128,256] [--ratios 1,4]

For every head_dim, state_dim and number of heads a group: the shared memory a kernel takes, what its threads spill from
their registers, and uniform registers that its code reads before anything wrote them. ptxas 12.8, which Triton 3.6
brings, adds offsets of matrix products' operands to such registers where the operands' rows are narrower than 128
bytes; the products then read whatever lies there, and nothing says so. `kernels.ssd.triton.LEAST_WIDTH` keeps the
kernels clear of it; this shows whether it does, and whether it still has to (LEAST_WIDTH=16 in the environment;
TRITON_PTXAS_PATH for another ptxas).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.ssd import hopper
from kernels.ssd import triton as ssd_triton

LARGEST_SHARED = 232_448                # bytes a program may have on Hopper
GROUPS = 4
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WITHOUT_RESULT = {"UISETP", "UPLOP3", "UPSETP", "USETMAXREG"}


class _Hopper:
    """As much of a driver as a compilation asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def compile_scan(ratio: int, head_dim: int, state_dim: int) -> dict[str, Any]:
    """Kernels of a forward and a backward by name; nothing is computed."""
    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        name = self.fn.__name__ + "".join(f", {k} {options[k]}" for k in ("BACKWARDS", "OF_C") if k in options)
        compiled[name] = launch(self, *arguments, grid=grid, warmup=True, **options)

    batch, length, heads = 2, 1024, GROUPS * ratio
    x, y, dx = (torch.empty(batch, length, heads, head_dim, dtype=torch.bfloat16) for _ in range(3))
    B, C, dB, dC = (torch.empty(batch, length, GROUPS, state_dim, dtype=torch.bfloat16) for _ in range(4))
    dt, one = torch.empty(batch, length, heads, dtype=torch.bfloat16), torch.empty(heads)
    for is_hopper in (True, False):
        there = patch.object(hopper, "is_hopper", lambda device, answer=is_hopper: answer)
        with patch.object(JITFunction, "run", compile_only), there:
            _, step, decay, states = ssd_triton.run_forward(x, dt, one, B, C, one, one, None, None, y)
            ssd_triton.run_backward(
                y, None, x, one, B, C, one, step, decay, states, None, dx, torch.empty_like(dt), dB, dC
            )
    return compiled


def spilled_bytes(cubin: bytes) -> int:
    """Of a thread's registers, kept in local memory."""
    (stack,) = re.findall(r"STACK:(\d+)", _read(cubin, "cuobjdump", "-res-usage"))
    return int(stack)


def _read(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def unset_registers(cubin: bytes) -> list[str]:
    """Uniform registers that may be read before they are written: those alive where the code begins."""
    text = _read(cubin, "nvdisasm", "-c")
    code: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append((found.group(1), found.group(2), "@" in line.split("*/")[1]))
    written, read, following = [], [], []
    for k, (name, operands, conditional) in enumerate(code):
        results, used = _uniform(name, operands)
        written.append(results)
        read.append(used)
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        after = {k + 1} if k + 1 < len(code) else set()
        if target:
            unconditional = not conditional and not re.match(r"!?U?P\d", operands)
            after = {labels[target.group()]} | (set() if unconditional else after)
        elif name.startswith("EXIT") and not conditional:
            after = set()
        following.append(after)
    alive: list[set[int]] = [set() for _ in code]
    changed = True
    while changed:
        changed = False
        for k in reversed(range(len(code))):
            now = read[k] | (set().union(*(alive[after] for after in following[k])) - written[k])
            changed |= now != alive[k]
            alive[k] = now
    return [f"UR{register}" for register in sorted(alive[0])]


def _uniform(name: str, operands: str) -> tuple[set[int], set[int]]:
    """Uniform registers an instruction writes and reads."""
    first, *_ = parts = re.split(r",\s*(?![^\[]*\])", operands)
    has_result = name.startswith(("U", "R2UR", "S2UR")) and name.split(".")[0] not in _WITHOUT_RESULT
    written: set[int] = set()
    if has_result and (result := re.match(r"UR(\d+)", first)):
        width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        written = set(range(int(result.group(1)), int(result.group(1)) + width))
        parts = parts[1:]
    read: set[int] = set()
    tile = re.match(r"UTMA(LDG|STG)\.(\d)D", name)      # the tile's place: memory, a load's barrier, coordinates
    for k, part in enumerate(parts):
        for register in re.findall(r"UR(\d+)", part):
            start = int(register)
            if "gdesc" in part:             # two descriptors; their second half where the first operand is in registers
                read |= {start + 2, start + 3} if re.match(r"R\d", parts[1]) else set(range(start, start + 4))
            elif tile and k == 0:
                read |= set(range(start, start + 1 + (tile.group(1) == "LDG") + int(tile.group(2))))
            elif "desc[" in part or tile or (".64" in part + name[6:] and not part.startswith("[")):
                read |= {start, start + 1}
            else:
                read |= {start}
    return written, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="16,32,64,128,256")
    parser.add_argument("--ratios", default="1,4")
    arguments = parser.parse_args()
    ssd_triton.LEAST_WIDTH = int(os.environ.get("LEAST_WIDTH", ssd_triton.LEAST_WIDTH))
    driver.set_active(_Hopper())
    sizes = [int(size) for size in arguments.sizes.split(",")]
    faults = 0
    print("| head_dim | state | heads a group | most shared memory | spilled bytes | unset registers |")
    print("| --- | --- | --- | --- | --- | --- |")
    for head_dim, state_dim, ratio in itertools.product(sizes, sizes, map(int, arguments.ratios.split(","))):
        if head_dim * state_dim > ssd_triton.LARGEST_STATE:
            continue
        compiled = compile_scan(ratio, head_dim, state_dim)
        shared = max(kernel.metadata.shared for kernel in compiled.values())
        unset = {name: found for name, kernel in compiled.items() if (found := unset_registers(kernel.asm["cubin"]))}
        spilled = {name: size for name, kernel in compiled.items() if (size := spilled_bytes(kernel.asm["cubin"]))}
        faults += bool(unset) + (shared > LARGEST_SHARED)
        print(f"| {head_dim} | {state_dim} | {ratio} | {shared:,}{' (too much)' * (shared > LARGEST_SHARED)} "
              f"| {spilled or 'none'} | {unset or 'none'} |", flush=True)
    raise SystemExit(faults > 0)


if __name__ == "__main__":
    main()
