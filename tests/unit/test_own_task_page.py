"""docs/own-task.md: its files and its commands, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from randopt.tasks.spec import load_task

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-task.md").read_text()
FILES = {name: body for _, name, body in re.findall(r"^```(\w+) (\S+)\n(.*?)^```", PAGE, flags=re.M | re.S)}


@pytest.fixture
def folder(tmp_path):
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    return tmp_path


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    program, _, rest = command.partition("#")[0].strip().partition(" ")
    start = {"randopt": "-m randopt.cli", "snakemake": f"-m snakemake --snakefile '{ROOT}/Snakefile'"}[program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    line = f"'{sys.executable}' {start} {rest}"
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_commands_of_the_page(folder):
    assert set(FILES) == {"capitals.csv", "capitals.yaml", "mine.yaml", "judge.py"}
    check, dry_run = (block.strip() for block in re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.M | re.S))
    done = run(folder, check)
    assert done.returncode == 0, done.stderr
    for words in ("capital of France?", "capital of Austria?", "capital of Finland?", "all is well"):
        assert words in done.stdout
    rewards = [line.split("│")[4].strip() for line in done.stdout.splitlines() if "│ select-00000" in line]
    assert rewards == ["1", "0", "1", "0"]

    done = run(folder, dry_run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^generate +\d+$", done.stdout + done.stderr, flags=re.M)
    assert "results/smollm2-135m/capitals/" in done.stdout + done.stderr


def test_the_mistakes_of_the_page(folder):
    task = FILES["capitals.yaml"].replace("max_tokens: 16", "max_tokens: 0").replace("{country}", "{contry}")
    (folder / "capitals.yaml").write_text(task)
    done = run(folder, "randopt task check capitals.yaml")
    said = re.search(r"^```text\n(.*?)^```", PAGE, flags=re.M | re.S)[1]
    assert done.returncode == 2 and done.stderr == said


def test_the_function_of_the_page(folder):
    spec = load_task({"name": str(folder / "capitals.yaml"), "scorer": "judge.py:close"}, ROOT / "config" / "tasks")
    from randopt.tasks import scorers

    judge = scorers.get(spec.scorer)
    assert judge.score("Paris.", "Paris") == (1.0, True, True, "Paris")
    assert judge.score("Perugia", "Paris") == (0.5, False, False, "Perugia")
    assert judge.score("", "Paris") == (0.0, False, False, None)
    table = re.search(r"^\| scorer \|.*?\n\n", PAGE, flags=re.M | re.S)[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if re.match(r"\| `\w+` ", line)]
    assert len(rows) == 6
    for name, _, options in rows:
        found = scorers.SCORERS[name.strip(" `")]
        assert set(re.findall(r"`(\w+)", options)) == set(found.options or {})
    assert yaml.safe_load(FILES["mine.yaml"])["tasks"] == ["capitals.yaml"]
