"""Compile the Triton kernel for GPUs that need not be there: `python triton_targets.py`, run by test_triton_kernel.py.

Prints a JSON list with, per GPU, format and kind of launch, what the test looks at in the compiled code.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from randopt.noise import triton_kernel

ALIGNED = [["tt.divisibility", 16]]


def compiled(capability: int, form: str, launch: str):
    """The kernel as Triton specialises it for a launch of one term or several terms, or on a slice.

    The first two are of a whole tensor, aligned and with a size divisible by 16. The slice starts inside a Philox
    block and has more than 2**31 elements and several terms.
    """
    word = "*i32" if form == "float32" else "*i16"
    signature = {"base": word, "out": word, "seeds": "*i64", "tables": "*i32", "key": "u64", "first": "u64"}
    signature |= {"skipped": "i32", "size": "i32", "terms": "i32", "FORMAT": "constexpr", "GROUPS": "constexpr"}
    constants = {"FORMAT": form, "GROUPS": triton_kernel.GROUPS}
    if launch == "one term":
        signature["terms"], constants["terms"] = "constexpr", 1
    if launch == "slice":
        signature["size"] = "i64"
    divisible = ("seeds", "tables") if launch == "slice" else ("base", "out", "seeds", "tables", "skipped", "size")
    aligned = {(list(signature).index(name),): ALIGNED for name in divisible}
    return triton.compile(
        ASTSource(triton_kernel.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": triton_kernel.WARPS, "enable_fp_fusion": False},
    )


def machine_code(cubin: bytes) -> str:
    """The processor's instructions, by the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout


def described(capability: int, form: str, launch: str) -> dict:
    """Which instructions the compiled kernel has."""
    kernel = compiled(capability, form, launch)
    instructions = re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", kernel.asm["ptx"], flags=re.MULTILINE)
    return {
        "capability": capability,
        "format": form,
        "launch": launch,
        "target": re.findall(r"\.target (\w+)", kernel.asm["ptx"]),
        "instructions": instructions,
        "machine": sorted(set(re.findall(r"\b[FHD](?:ADD|MUL|FMA)2?\b[.\w]*", machine_code(kernel.asm["cubin"])))),
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    kinds = [(capability, launch) for capability in (80, 90) for launch in ("one term", "several terms")]
    forms = triton_kernel.FORMATS.values()
    print(json.dumps([described(c, form, launch) for c, launch in [*kinds, (90, "slice")] for form in forms]))
