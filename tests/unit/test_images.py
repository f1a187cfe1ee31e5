"""Items with pictures: read from tables, kept by content, part of every identity; text tasks are what they were."""

import io
import json
import shutil

import pytest
import yaml
from rich.console import Console

from randopt import config, experiment, layout, tables
from randopt.errors import UserError
from randopt.fetch import _places
from randopt.items import items_hash, read_items, to_items, write_items
from randopt.models.vision import TOWER
from randopt.tasks.check import check
from randopt.tasks.items import make_items
from randopt.tasks.spec import SPLITS, TaskSpec, identity, load_task
from tests.conftest import ROOT
from tests.vision import picture, task_file, write_questions

SIZES = {"select": {"size": 4}, "confirm": {"size": 4, "start": 4}, "test": {"size": 4, "start": 8}}


@pytest.fixture
def task(tmp_path):
    """A task of twelve pictures and its path."""
    write_questions(tmp_path)
    return task_file(tmp_path, {"file": "questions.jsonl"}, SIZES)


def made(path):
    pictures = {}
    spec = load_task(str(path), ROOT / "config" / "tasks")
    return make_items(spec, images=pictures), pictures


def test_items_hold_the_name_of_their_picture(task):
    frames, pictures = made(task)
    assert all(frame.schema == tables.IMAGE_ITEMS.schema for frame in frames.values())
    first = frames["select"].row(0, named=True)
    (message,) = first["messages"]
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["value"] == " What colour is it ? Answer in box"
    name = message["content"][0]["value"]
    assert pictures[name].data == (task.parent / "pictures" / "0.png").read_bytes()
    assert len(pictures) == 12 and {n.rpartition(".")[2] for n in pictures} == {"png", "jpg"}
    assert len({h for frame in frames.values() for h in frame["content_hash"]}) == 12


def test_a_task_folder_is_self_contained_and_hashes_cover_the_picture(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frames, pictures = made(task)
    folder = layout.task_folder("t-1")
    write_items(frames, folder, pictures)
    shutil.rmtree(tmp_path / "pictures")
    moved = folder.rename(folder.with_name("t-2"))
    table = read_items("t-2", SPLITS)
    items = to_items(table, moved)
    assert [item.images[0].data for item in items] == [image.data for image in pictures.values()]
    assert items[0].images[0].decoded().size == (28, 28)
    swapped = table.to_dicts()
    swapped[0]["messages"], swapped[1]["messages"] = (swapped[1]["messages"], swapped[0]["messages"])
    import polars as pl

    assert items_hash(pl.DataFrame(swapped, schema=table.schema)) != items_hash(table)
    path = moved / "images" / items[0].images[0].name
    path.write_bytes(b"x" + path.read_bytes())
    with pytest.raises(UserError, match=r"is damaged.*Remove the \*.parquet files"):
        to_items(table, moved)
    write_items(frames, moved, pictures)
    assert to_items(table, moved) == items
    path.unlink()
    with pytest.raises(UserError, match=r"cannot be read.*Remove the \*.parquet files"):
        to_items(table, moved)


def test_another_picture_under_the_same_path_is_another_task(task):
    spec = load_task(str(task), ROOT)
    before = identity(spec)
    frames, _ = made(task)
    (task.parent / "pictures" / "11.jpg").write_bytes(picture((1, 2, 3), kind="JPEG"))
    assert identity(spec) != before and "pictures" not in json.dumps(before)
    again, _ = made(task)
    assert [a.equals(b) for a, b in zip(frames.values(), again.values(), strict=True)] == [True, True, False]
    outside = load_task(
        str(task_file(task.parent, {"file": "questions.jsonl"}, {**SIZES, "test": {"size": 3, "start": 8}})), ROOT
    )
    unused = identity(outside)
    (task.parent / "pictures" / "11.jpg").write_bytes(picture((9, 9, 9), kind="JPEG"))
    assert identity(outside) == unused, "rows that no split uses do not matter"
    assert TaskSpec(**yaml.safe_load(yaml.safe_dump(spec.__dict__))) == spec


def test_pictures_inside_of_a_parquet_file(task):
    """As the package datasets writes them; items and hashes are those of the files."""
    import datasets

    rows = [json.loads(line) for line in (task.parent / "questions.jsonl").read_text().splitlines()]
    cells = [{**row, "image": {"bytes": (task.parent / row["image"]).read_bytes(), "path": None}} for row in rows]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    table = datasets.Dataset.from_list(cells, features=features)
    table.to_parquet(str(task.parent / "questions.parquet"))
    expected, _ = made(task)
    found, _ = made(task_file(task.parent, {"file": "questions.parquet"}, SIZES))
    assert all(found[split].equals(expected[split]) for split in SPLITS)


@pytest.fixture
def gqa(tmp_path, monkeypatch):
    """The shape of lmms-lab/GQA in a cache of the Hub: questions and pictures apart, two questions about a picture."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    given = load_task("gqa", ROOT / "config" / "tasks").source
    folder = tmp_path / "datasets--lmms-lab--GQA" / "snapshots" / given["revision"]
    features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
    configs = []
    for part, count in (("train", 400), ("testdev", 12)):
        names = [f"{part}{index // 2}" for index in range(count)]
        rows = [{"id": f"q{i}", "imageId": n, "question": f"What is {i} ?", "answer": "a"} for i, n in enumerate(names)]
        colours = {name: (i % 250, len(name), i // 250) for i, name in enumerate(dict.fromkeys(names))}
        cells = [
            {"id": name, "image": {"bytes": picture(c, (8, 8)), "path": None}} for name, c in reversed(colours.items())
        ]
        tables = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(cells, features=features)
        for name, table in zip((given["config"][part], given["join"]["config"][part]), tables, strict=True):
            (folder / name).mkdir(parents=True)
            table.to_parquet(folder / name / f"{part}-0.parquet")
            files = [{"split": part, "path": f"{name}/{part}-*"}]
            configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return lambda **entry: load_task({"name": "gqa", **entry}, ROOT / "config" / "tasks")


def test_two_configs_of_the_hub_are_joined(gqa):
    pictures = {}
    spec = gqa(splits={"test": 12})
    frames = make_items(spec, ROOT, pictures)
    assert {split: frame.height for split, frame in frames.items()} == {"select": 200, "confirm": 200, "test": 12}
    assert len(pictures) == 206
    first, second, third = [row["messages"][0]["content"] for row in frames["test"].head(3).to_dicts()]
    assert first[0] == second[0] != third[0] and first[1]["value"].startswith("What is 0 ?\n")
    assert "\\boxed{}." in first[1]["value"]
    with pytest.raises(
        UserError, match="splits name the part 'val', but the configs of the source are for train, testdev"
    ):
        make_items(gqa(splits={"test": {"size": 3, "part": "val"}}))


def test_joined_tables_of_several_parts(gqa):
    """A row of each part gets its own part's pictures."""
    splits = {"select": 4, "confirm": {"start": 4, "size": 4}}
    spec = gqa(splits={**splits, "test": {"part": "train+testdev", "start": 398, "size": 4}})
    pictures = {}
    frames = make_items(spec, ROOT, pictures)
    first, second, third, fourth = [row["messages"][0]["content"] for row in frames["test"].to_dicts()]
    assert [part[1]["value"].partition(" ?")[0] for part in (first, second, third, fourth)] == [
        "What is 398", "What is 399", "What is 0", "What is 1",
    ]  # fmt: skip
    assert first[0] == second[0] != third[0] == fourth[0]


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ({"keys": {"imageId": "id"}}, r"source\.join: the key 'config' is missing"),
        ({"config": "x", "keys": {}}, r"source\.join\.keys: \{\} was given, expected one column of each table"),
        ({"config": "x", "keys": {"a": "b", "c": "d"}}, "expected one column of each table"),
        ({"config": {"train": 3}, "keys": {"a": "b"}}, r"source\.join\.config\.train: 3 was given"),
        ("images", r"expected config and keys, as in \{config: images"),
    ],
)
def test_mistakes_in_a_join(gqa, join, message):
    with pytest.raises(UserError, match=message):
        gqa(source={"join": join})


def test_columns_and_rows_that_a_join_lacks(gqa):
    configs = gqa().source["join"]["config"]
    with pytest.raises(UserError, match=r"source.join: the column 'picture' is missing from part 'train'.*id, image"):
        make_items(gqa(source={"join": {"config": configs, "keys": {"imageId": "picture"}}}))
    with pytest.raises(UserError, match="row 0 of part 'train': 'q0' is not in the joined table"):
        make_items(gqa(source={"join": {"config": configs, "keys": {"id": "id"}}}))


def test_everything_that_is_joined_is_fetched(gqa):
    source = gqa().source
    wanted = [*source["config"].values(), *source["join"]["config"].values()]
    assert _places(source) == [("lmms-lab/GQA", config, source["revision"]) for config in wanted]
    assert _places({"file": "x.csv"}) == []


def test_pictures_of_joined_files_are_part_of_the_identity(task):
    """Each path starts at the folder of its own table."""
    import polars as pl

    folder = task.parent
    lines = (folder / "questions.jsonl").read_text().splitlines(keepends=True)
    (folder / "more").mkdir()
    shutil.move(folder / "pictures" / "11.jpg", folder / "more" / "11.jpg")
    (folder / "questions.jsonl").write_text("".join(lines[:11]))
    (folder / "more" / "last.jsonl").write_text(lines[11].replace("pictures/", ""))
    splits = {name: {**split, "part": "train+last"} for name, split in SIZES.items()}
    path = task_file(folder, {"file": {"train": "questions.jsonl", "last": "more/last.jsonl"}}, splits)
    before, (frames, _) = identity(load_task(str(path), ROOT)), made(path)
    assert pl.concat(frames.values()).height == 12
    (folder / "more" / "11.jpg").write_bytes(picture((1, 2, 3), kind="JPEG"))
    assert identity(load_task(str(path), ROOT)) != before


def test_task_check_shows_where_pictures_stand(task):
    out = io.StringIO()
    check(str(task), [], None, "select-00000", Console(file=out, width=150))
    (name,) = [
        part["value"] for part in made(task)[0]["select"]["messages"][0][0]["content"] if part["type"] == "image"
    ]
    assert f"[picture {name}]" in out.getvalue() and "What colour is it ?" in out.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "pictures/none.png"}, r"row 0.*none.png does not exist; paths start at the table's folder"),
        ({"image": 7}, "row 0 of part 'train', column 'image': '7' was given for a picture"),
        ({"image": "questions.jsonl"}, "column 'image': the picture cannot be decoded"),
        ({"image": "cut.png"}, "column 'image': the picture cannot be decoded"),
        ({"image": "old.gif"}, "the picture is GIF, expected one of PNG, JPEG, WEBP; convert it"),
    ],
)
def test_bad_pictures_are_named(task, change, message):
    (task.parent / "cut.png").write_bytes(picture((1, 1, 1))[:60])
    (task.parent / "old.gif").write_bytes(picture((1, 1, 1), kind="GIF"))
    path = task.parent / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, **change, "question": str(n)}) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(UserError, match=message):
        identity(load_task(str(task), ROOT))
        make_items(load_task(str(task), ROOT))


IMAGE, TEXT = {"type": "image", "column": "image"}, {"type": "text", "text": "{question}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"content: \[\] was given, expected text, or a list of \{type: image"),
        ([{"type": "image"}], "expected {type: image, column: NAME}"),
        ([{**IMAGE, "text": "x"}], "expected {type: image, column: NAME}"),
        ([{"type": "video", "column": "image"}], "expected {type: image, column: NAME}"),
        (["{question}"], "expected {type: image, column: NAME}"),
        ([IMAGE, {"type": "text", "text": "{image}"}], r"\['image'\] are named in braces and as images"),
        ([{"type": "text", "text": "What?"}], "every item would ask the same"),
    ],
)
def test_bad_contents_are_refused(task, content, message):
    given = yaml.safe_load(task.read_text())
    given["prompt"][0]["content"] = content
    task.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match=message):
        load_task(str(task), ROOT)


def test_sources_without_pictures_refuse_them(tmp_path):
    given = yaml.safe_load((ROOT / "config" / "tasks" / "times_table.yaml").read_text())
    given["prompt"] = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "{a}"}]}]
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(UserError, match="the image 'image' was given, but this source has none; use hub or file"):
        load_task(str(path), ROOT)


# Identity.


def runs(tasks, **model):
    given = {
        "experiment": "x",
        "models": [{"name": "m", "source": "hf:a/b@" + "0" * 40, **model}],
        "tasks": tasks,
        "search": {"candidates": 1, "shard_size": 1, "sigmas": [0.1]},
        "ensemble": {"top_k": [1]},
    }
    return [run.description for run in experiment.build(config.resolve(given), ROOT).runs]


def test_identities_of_text_tasks_are_those_of_published_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {d["task_id"]: d["run_id"] for d in runs(["times_table", "countdown", "gsm8k"])}
    assert found == PUBLISHED
    assert all(d["model"]["exclude"] == [] for d in runs(["times_table"]))
    assert runs(["times_table"], exclude=[]) == runs(["times_table"])


def test_the_vision_tower_is_left_out_by_default_where_a_task_shows_pictures(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (default,) = runs([str(task)])
    assert default["model"]["exclude"] == sorted(TOWER)
    (every,) = runs([str(task)], exclude=[])
    assert every["model"]["exclude"] == [] and every["run_id"] != default["run_id"]
    (own,) = runs([str(task)], exclude=["*b*", "*a*"])
    assert own["model"]["exclude"] == ["*a*", "*b*"]


def test_items_of_text_tasks_are_what_completions_are_tied_to(tmp_path):
    frames = make_items(load_task("times_table", ROOT / "config" / "tasks"), ROOT)
    write_items(frames, tmp_path, {})
    assert not (tmp_path / "images").exists()
    assert items_hash(tables.read(tmp_path / "select.parquet", tables.ITEMS)) == "725ceca3e1b325e3"


PUBLISHED = {
    "times_table-351ccb6194": "57fcd3976f",
    "countdown-a84490755d": "4518985b2a",
    "gsm8k-76ac358599": "99247ada24",
}
