from __future__ import annotations

import ast
import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest

from albor_serve.bench.replay.build_scenes import PERMISSIVE, cut_scenes
from albor_serve.bench.replay.scenes import KINDS, Scene, Source, load_scenes, pick_scenes
from albor_serve.errors import ConfigError

PINS = Path(__file__).parents[3] / "specs" / "sources.lock.yaml"
HELD_OUT = {"networkx", "jinja2", "httpx", "rich", "flask", "black", "marshmallow"}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return load_scenes()


def test_there_are_enough_of_every_kind(scenes: list[Scene]) -> None:
    kinds = Counter(scene.kind for scene in scenes)
    assert len(scenes) >= 60
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 6
    assert len({scene.source.project for scene in scenes}) >= 12


def test_no_scene_is_from_training_data(scenes: list[Scene]) -> None:
    trained = {line.split()[-1] for line in PINS.read_text().splitlines() if "name: " in line}
    assert len(trained) > 100
    assert not {scene.source.project for scene in scenes} & (trained - HELD_OUT)


def test_scenes_are_whole_and_licensed(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.before + scene.typed + scene.after == scene.source.text
        assert scene.typed.strip()
        ast.parse(scene.source.text)
        for source in (scene.source, *scene.open_files):
            assert hashlib.sha256(source.text.encode()).hexdigest() == source.sha256
            assert PERMISSIVE.search(source.licence)
        assert (scene.old != "") <= (scene.kind == "condition")
        assert bool(scene.open_files) == (scene.kind == "test")


def test_picking_is_seeded_and_takes_kinds_in_turn(scenes: list[Scene]) -> None:
    picked = pick_scenes(scenes, 12, seed=1)
    assert Counter(scene.kind for scene in picked) == dict.fromkeys(KINDS, 2)
    assert picked == pick_scenes(scenes, 12, seed=1)
    assert picked != pick_scenes(scenes, 12, seed=2)
    assert len(pick_scenes(scenes, None, seed=1)) == len(scenes)


def test_cuts_lie_where_code_is_written() -> None:
    text = (
        "def área(größe, flag):\n"
        "    '''Doc.'''\n"
        "    total = sum(größe) + len(größe) * 2\n"
        "    if flag is not None and total > 10:\n"
        "        print('🐍', total, sep=', ')\n"
        "    kept = flag.pop(größe, total) + [flag]\n"
        "    return sorted(kept)[0]\n"
    )
    files = [Source("demo", "1", "MIT", f"{at}.py", "", text) for at in range(5)]
    scenes = cut_scenes(files, random.Random(0))
    assert [scene.kind for scene in scenes] == list(KINDS[:-1])
    assert len({scene.source.path for scene in scenes}) == 5
    assert all(scene.before + scene.typed + scene.after == text for scene in scenes)
    by_kind = {scene.kind: scene for scene in scenes}
    assert by_kind["argument"].typed == ", sep=', '"
    assert by_kind["condition"].typed == "flag is not None and total > 10"
    assert by_kind["condition"].old == "flag is None and total > 10"
    assert by_kind["body"].typed.startswith("total = sum(")
    assert by_kind["body"].typed.endswith("[0]")


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "scenes.json.gz"
    path.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="rebuild them"):
        load_scenes(path)
