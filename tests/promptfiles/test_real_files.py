"""Every real file in the data folder loads, with its rows and its hash."""

from __future__ import annotations

from functools import cache

import pytest
from promptfiles import made

from lethebench.promptfiles.readers import format_of, read
from lethebench.promptfiles.sources import SOURCES, VARIABLE
from lethebench.registry import PROMPT_SETS
from lethebench.store import file_sha256

FOLDER = made.real_folder()
ROWS = {
    "coco/esd_coco_30k.csv": 30000,
    "comic_characters/dc-wikia-data.csv": 6896,
    "comic_characters/marvel-wikia-data.csv": 16376,
    "neutral/PartiPrompts.tsv": 1632,
    "sd_memorized/beprss_sdv1_500_mem_groundtruth_repeated_withss.jsonl": 4,
    "sd_memorized/memattn_group_nomem500.txt": 500,
    "sd_memorized/memattn_sd1_mem345.txt": 345,
    "sd_memorized/memattn_sd2_mem219.txt": 219,
    "sd_memorized/nemo_coco2014_val_10000.csv": 10000,
    "sd_memorized/nemo_memorized_laion_prompts.csv": 500,
    "sd_memorized/nemo_unmemorized_laion_prompts.csv": 500,
    "sd_memorized/nemofork_additional_laion_prompts_500.csv": 500,
    "sd_memorized/nemofork_memorized_laion_prompts_rewrite_1.csv": 494,
    "six_cd/Artstyle.csv": 10,
    "six_cd/Character.csv": 100,
    "six_cd/Object.csv": 10,
    "six_cd/benign.csv": 500,
    "six_cd/templates/Artstyle.txt": 4,
    "six_cd/templates/Celebrity_Copyright_Object.txt": 4,
} | {name: 30 for name in SOURCES if name.startswith("sd_memorized/conceptablation")}
SETS = {
    # name: (rows read, prompts, clusters, training prompts, prompts with paraphrases)
    "coco-10k": (10000, 9966, 9966, 512, 0),
    "coco-30k": (30000, 30000, 29495, 512, 0),
    "coco-5k": (30000, 5000, 4977, 512, 0),
    "comic": (23272, 2000, 2000, 0, 2000),
    "nomem-ren": (500, 500, 500, 0, 0),
    "partiprompts": (1632, 1632, 1632, 0, 0),
    "sd-additional-nemo": (500, 244, 244, 256, 0),
    "sd-memorized-beprss": (4, 4, 4, 0, 4),
    "sd-memorized-ca": (8, 8, 8, 0, 8),
    "sd-memorized-nemo": (500, 500, 500, 0, 493),
    "sd-unmemorized-nemo": (500, 500, 500, 0, 0),
    "sd1-mem-ren": (345, 345, 345, 0, 0),
    "sd2-mem-ren": (219, 219, 219, 0, 0),
    "six-cd-artstyle": (10, 40, 10, 0, 40),
    "six-cd-benign": (500, 500, 497, 0, 0),
    "six-cd-character": (100, 400, 100, 0, 400),
    "six-cd-object": (10, 40, 10, 0, 40),
}

pytestmark = pytest.mark.skipif(
    FOLDER is None, reason=f"no folder with the real files: neither {VARIABLE} nor ../shared/data"
)


@cache
def registered(name):
    return PROMPT_SETS.get(name)()


@pytest.fixture(autouse=True)
def data(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(FOLDER))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_and_hash(name):
    source, path = SOURCES[name], FOLDER / name
    assert (file_sha256(path), path.stat().st_size) == (source.sha256, source.bytes)
    laion = "laion" in name or "nemo_coco" in name
    settings = {"separator": ";", "quoting": "rewrite" not in name} if laion else {}
    table = read(path, format_of(path), **settings)
    assert len(table.rows) == ROWS[name]
    assert all(len(row.cells) == len(table.columns) for row in table.rows)


@pytest.mark.parametrize("name", sorted(SETS))
def test_sets(name):
    prompts = registered(name)
    found, manifest = list(prompts), prompts.manifest()
    assert all(f["sha256"]["found"] == f["sha256"]["expected"] for f in manifest["files"])
    training = prompts.training_prompts()
    rephrased = sum(bool(prompts.paraphrases(p.id)) for p in found)
    counted = (
        manifest["rows"]["read"],
        len(found),
        len({p.cluster for p in found}),
        len(training),
        rephrased,
    )
    assert counted == SETS[name]
    assert not {p.text for p in found} & set(training)
    assert len(set(training)) == len(training)


def test_memorized_prompts_are_as_published():
    found = list(registered("sd-memorized-nemo"))
    kinds = [p.kind for p in found]
    assert (kinds.count("vm"), kinds.count("tm")) == (112, 388)
    assert all((float(p.attributes.get("max_sscd", 0)) > 0.7) == (p.kind == "vm") for p in found)
    assert sum("max_sscd" not in p.attributes for p in found) == 13
    texts = {p.text for p in found}
    assert all(p.text in texts for p in registered("sd1-mem-ren"))


def test_comic_names_are_whole():
    names = [p.concept for p in registered("comic")]
    assert {"Batman", "Spider-Man", "Armando Muñoz"} < set(names)
    assert not any("\\" in name or "(" in name for name in names)
