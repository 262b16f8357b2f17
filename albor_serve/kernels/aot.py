"""Compile the kernels ahead of time, without a GPU, and check the machine code.

What is checked (`check`): nothing spills; weights come in 16-byte loads; every inline assembly that
counts on four neighbouring elements in each thread has such a layout; nothing was moved through
shared memory on the way to the tensor core but the sums that need it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from albor_serve.errors import BackendError
from albor_serve.kernels._triton import require_triton

__all__ = ["CAPABILITIES", "CompiledKernel", "check", "compile_kernel"]

CAPABILITIES: Final = (80, 86, 89, 90)
"""Compute capabilities, times ten, that the kernels are compiled for."""


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code of one kernel and what can be read off it."""

    name: str
    capability: int
    num_registers: int
    stack_bytes: int
    """Local memory of a thread: above 0 where registers spilled."""
    shared_bytes: int
    sass: str
    ttgir: str

    def count(self, pattern: str) -> int:
        """Instructions whose text matches a regular expression."""
        return len(re.findall(pattern, self.sass))

    @property
    def num_instructions(self) -> int:
        """Instructions in the listing."""
        return self.count(r"/\*[0-9a-f]{4,}\*/\s+\S")


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    options: Mapping[str, Any],
) -> CompiledKernel:
    """Compile `kernel` for one GPU generation.

    Args:
        kernel: a Triton function.
        signature: Triton type of each argument that is not a constant, such as "*fp32". Pointers
            are taken to be 16-byte aligned, as torch's are.
        constants: values of the tl.constexpr arguments.
        capability: compute capability times ten.
        options: num_warps and the like.

    Raises:
        BackendError: Triton is missing or the kernel does not compile.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if full[n].startswith("*")
    }
    source = ASTSource(kernel, full, dict(constants), attributes)
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(options)
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BackendError(
            f"{kernel.__name__} does not compile for sm_{capability}: {reason}"
        ) from error
    resources, sass = _disassemble(compiled.asm["cubin"])
    return CompiledKernel(
        name=kernel.__name__,
        capability=capability,
        num_registers=_number(r"REG:(\d+)", resources),
        stack_bytes=_number(r"STACK:(\d+)", resources) + _number(r"LOCAL:(\d+)", resources),
        shared_bytes=compiled.metadata.shared,
        sass=sass,
        ttgir=compiled.asm["ttgir"],
    )


def check(kernel: CompiledKernel) -> list[str]:
    """What is wrong with the machine code, one line each; empty if nothing."""
    problems = []
    if kernel.stack_bytes:
        problems.append(f"{kernel.stack_bytes} bytes of each thread spill to memory")
    layouts = _layouts(kernel.ttgir)
    for line in kernel.ttgir.splitlines():
        if "elementwise_inline_asm" not in line or "packed_element = 4" not in line:
            continue
        # One-dimensional tensors; those of several axes are laid out by the loads they meet.
        for shape, layout in re.findall(r"tensor<(\d+)x(?!\d)[^,>]+, (#\w+)>", line):
            if layouts.get(layout) != "4":
                problems.append(f"inline assembly over {shape} elements has layout {layout}")
    return problems


def _layouts(ttgir: str) -> dict[str, str]:
    """Elements a thread holds side by side, for each one-dimensional blocked layout."""
    found = re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[(\d+)\],", ttgir)
    return dict(found)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(flag: str) -> str:
            return subprocess.run(  # noqa: S603 - Triton's own tool
                [str(tools / "cuobjdump"), flag, file.name],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip

        return run("-res-usage"), run("-sass")


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    return int(match.group(1)) if match else 0
