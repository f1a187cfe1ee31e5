"""What several tests share: a tiny real model, and a checkout to run the workflow in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Words of the times-table prompt and of answers; enough for a word-level tokenizer.
WORDS = ["What", "is", "times", "?", "Answer", "with", "only", "the", "number", ".", "=", "So", "answer"]


def build_tiny_model(folder: Path, dtype: str = "bfloat16", head_dim: int = 8) -> Path:
    """A two-layer Llama with random weights and a word-level tokenizer, as a checkpoint folder.

    The weights are a fixed function of a seed; its answers are nonsense, but real generations.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<eos>", *WORDS, *map(str, range(26))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of the tiny model."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


class Checkout:
    """A copy of the workflow's files with a small config, where Snakemake is run as a user would."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        for name in ("Snakefile", "workflow", "config", "profiles", "slurm", "envs"):
            source = ROOT / name
            if source.is_symlink():
                (folder / name).symlink_to(os.readlink(source))
            elif source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        self.config = {
            "experiment": "tiny",
            "models": [{"name": "tiny", "source": f"path:{model}"}],
            "tasks": [
                {
                    "name": "times_table",
                    "splits": {"select": 6, "confirm": 5, "test": 8},
                    "max_tokens": 4,
                    "source": {"low": 1, "high": 5, "smaller_high": 5},
                }
            ],
            "search": {"candidates": 16, "sigmas": [0.05, 0.2], "shard_size": 8},
            "ensemble": {"top_k": [1, 2, 3], "members": 3},
            "statistics": {"bootstrap": 200},
        }

    @property
    def environment(self) -> dict[str, str]:
        """Our package from this copy, no Hub, little noise."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SNAKEMAKE_"))}
        environment["PYTHONPATH"] = str(self.folder / "workflow")
        environment["HF_HUB_OFFLINE"] = "1"
        return environment

    def write_config(self) -> Path:
        path = self.folder / "tiny.yaml"
        path.write_text(json.dumps(self.config))
        return path

    def command(self, *arguments: str) -> list[str]:
        """Snakemake on this checkout's config."""
        base = [sys.executable, "-m", "snakemake", "--cores", "2", "--configfile", str(self.write_config())]
        return [*base, *arguments]

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Snakemake to its end; its output is shown when it fails unexpectedly."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"snakemake failed:\n{done.stdout}\n{done.stderr}")
        return done

    def randopt(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command `randopt` of this copy."""
        return subprocess.run(
            [sys.executable, "-m", "randopt.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @property
    def run(self) -> Path:
        """The folder of the only run."""
        (found,) = self.folder.glob("results/tiny/times_table/*")
        return found

    def tables(self) -> dict[str, bytes]:
        """Every table but the ledgers, by path below results/."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted((self.folder / "results").rglob("*.parquet"))
            if path.parent.name != "ledger"
        }


@pytest.fixture
def checkout(tmp_path: Path, tiny_model: Path) -> Checkout:
    """A fresh checkout with the tiny config; nothing has run in it."""
    return Checkout(tmp_path, tiny_model)
