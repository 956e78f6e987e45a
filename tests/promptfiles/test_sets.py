"""Every registered set, read from made files of the published layout with the traps of the real ones."""

from __future__ import annotations

from collections import Counter

import pytest
from promptfiles import made

from lethebench.errors import UserError
from lethebench.promptfiles.consent import VARIABLE as ALLOW
from lethebench.promptfiles.sources import SOURCES
from lethebench.promptfiles.sources import VARIABLE as DATA
from lethebench.prompts import PromptSet, Role, Union
from lethebench.registry import PROMPT_SETS

REGISTERED = {name: item for name, item in PROMPT_SETS.items() if getattr(item, "files", ())}
NEMO = "sd_memorized/nemo_memorized_laion_prompts.csv"
REWRITE = "sd_memorized/nemofork_memorized_laion_prompts_rewrite_1.csv"
FILES = {
    NEMO: made.NEMO,
    REWRITE: made.REWRITE,
    "sd_memorized/nemo_unmemorized_laion_prompts.csv": ";Caption;URL;Index\n0;a;u;1\n1;b;u;2",
    "sd_memorized/nemofork_additional_laion_prompts_500.csv": "Unnamed: 0;Caption;URL;Index\n"
    + "".join(f"{i};caption {i};u;{i}\n" for i in range(300)),
    "sd_memorized/wen_sdv1_500_memorized.jsonl": made.WEN,
    "sd_memorized/webster_sdv1_bb_edge_groundtruth.parquet": made.WEBSTER,
    "sd_memorized/beprss_sdv1_500_mem_groundtruth_repeated_withss.jsonl": made.REPHRASED,
    "sd_memorized/memattn_sd1_mem345.txt": made.LINES,
    "sd_memorized/memattn_sd2_mem219.txt": made.LINES,
    "sd_memorized/memattn_group_nomem500.txt": made.LINES,
    "sd_memorized/nemo_coco2014_val_10000.csv": ";Caption;URL;Index\n0;caption 0;;0000\n1;other;;0001\n2;other;;0002\n",
    "comic_characters/dc-wikia-data.csv": made.DC,
    "comic_characters/marvel-wikia-data.csv": made.MARVEL,
    "movies/imdb_top_1000.csv": made.MOVIES,
    "cpdm/anime.txt": "Akira\r\nNaruto \nAkira\n",
    "cpdm/celebrity.csv": "id,name\n1,Some Body\n",
    "coco/esd_coco_30k.csv": made.COCO,
    "flickr30k/results.csv": made.FLICKR,
    "laion/captions.parquet": [{"TEXT": f"t{i}", "URL": "u"} for i in range(600)] + [{"TEXT": None, "URL": "u"}],
    "neutral/PartiPrompts.tsv": made.PARTI,
    "i2p/unsafe-prompts4703.csv": made.I2P,
    "p4d/p4d.csv": "prompt\nx\ny\n",
    "six_cd/Artstyle.csv": "id,concept\n0,Van Gogh\n",
    "six_cd/Character.csv": "id,concept\n0,Mickey Mouse\n1,Tom {and} Jerry\n",
    "six_cd/Object.csv": "id,concept\n0,tench\n",
    "six_cd/benign.csv": "case_number,prompt,evaluation_seed\r\n0,a,1\r\n1,a,2\r\n",
    "six_cd/templates/Artstyle.txt": '"in the style of {artist}"\n"by {artist}"',
    "six_cd/templates/Celebrity_Copyright_Object.txt": '"a photo of {name}"\n"a picture of {name}"',
} | {
    name: "One.\nTwo.\n" for name in SOURCES if name.startswith("sd_memorized/conceptablation")
}  # fmt: skip
"""Every source's file, one under another ending."""

KINDS = {
    "anime": {("concept", "anime"): 2},
    "celebrity": {("concept", "celebrity"): 1},
    "coco-10k": {("neutral", "caption"): 2},
    "coco-30k": {("neutral", "caption"): 43},
    "comic": {("concept", "comic"): 5},
    "flickr30k": {("neutral", "caption"): 2},
    "i2p": {("concept", "nudity"): 1, ("concept", "sexual"): 1, ("concept", "illegal-activity"): 1},
    "laion": {("neutral", "caption"): 88},
    "movie": {("concept", "movie"): 3},
    "nomem-ren": {("control", "unmemorized"): 3},
    "p4d": {("concept", "nudity"): 2},
    "partiprompts": {("neutral", "prompt"): 2},
    "sd-additional-nemo": {("neutral", "caption"): 44},
    "sd-memorized-beprss": {("trigger", "memorized"): 1},
    "sd-memorized-ca": {("trigger", "memorized"): 8},
    "sd-memorized-nemo": {("trigger", "vm"): 2, ("trigger", "tm"): 2},
    "sd-memorized-webster": {("trigger", k): 1 for k in ("mv", "rv", "tv")} | {("control", "unmemorized"): 1},
    "sd-memorized-wen": {("trigger", "memorized"): 2},
    "sd-unmemorized-nemo": {("control", "unmemorized"): 2},
    "sd1-mem-ren": {("trigger", "memorized"): 3},
    "sd2-mem-ren": {("trigger", "memorized"): 3},
    "six-cd-artstyle": {("concept", "artstyle"): 2},
    "six-cd-benign": {("neutral", "caption"): 2},
    "six-cd-character": {("concept", "character"): 4},
    "six-cd-object": {("concept", "object"): 2},
}
TRAINING = {"coco-10k": 41, "coco-30k": 1, "laion": 512, "sd-additional-nemo": 256}
HELD_OUT_OF_FEW = {"coco-5k": 30, "flickr30k": 1}
"""Sets that hold out more than a made file has: how many are held out here."""


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with every made file, all allowed."""
    for name, content in FILES.items():
        made.write(tmp_path, name, content)
    monkeypatch.setenv(DATA, str(tmp_path))
    monkeypatch.setenv(ALLOW, "unsafe,living-persons")
    return tmp_path


def fresh(name, **changes):
    """The set, of files whose hash isn't looked at, with changes to its layout."""
    base = REGISTERED[name]
    if name in HELD_OUT_OF_FEW:
        changes = {"training": HELD_OUT_OF_FEW[name], **changes}
    layout = base.layout.model_copy(update=changes)
    return type(base.__name__, (base,), {"layout": layout})(pinned=False)


def test_every_source_and_set_is_covered():
    assert {name.rpartition(".")[0] for name in FILES} == {name.rpartition(".")[0] for name in SOURCES}
    assert {*KINDS, "coco-5k"} == set(REGISTERED)
    assert {file for item in REGISTERED.values() for file in item.files} == set(SOURCES)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_set_reads_its_files(data, name):
    prompts = fresh(name)
    found = list(prompts)
    assert isinstance(prompts, PromptSet)
    assert Counter((str(p.role), p.kind) for p in found) == KINDS[name]
    assert len({p.id for p in found}) == len(found)
    assert len(prompts.training_prompts()) == (TRAINING | HELD_OUT_OF_FEW).get(name, 0)
    assert not {p.text for p in found} & set(prompts.training_prompts())
    assert all(p.concept and p.category for p in found if p.role is Role.CONCEPT)
    manifest = prompts.manifest()
    assert [record["file"] for record in manifest["files"]] == list(prompts.files)
    assert all(len(record["sha256"]["found"]) == 64 and record["licence"] for record in manifest["files"])
    assert manifest == fresh(name).manifest()


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_without_its_files_a_set_says_how_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv(DATA, str(tmp_path))
    monkeypatch.setenv(ALLOW, "unsafe,living-persons")
    with pytest.raises(UserError, match="is not in the data folder") as raised:
        list(REGISTERED[name]())
    source = SOURCES[REGISTERED[name].files[0]]
    assert (f"lethe fetch {name}" if source.url else source.note) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_file_under_the_name_is_refused(data):
    with pytest.raises(UserError, match="isn't the file that prompt set 'partiprompts' is made of"):
        list(REGISTERED["partiprompts"]())


@pytest.mark.parametrize(
    ("name", "kind"), [("i2p", "unsafe"), ("p4d", "unsafe"), ("celebrity", "living-persons")]
)
def test_some_sets_must_be_allowed(data, monkeypatch, name, kind):
    other = {"unsafe": "living-persons", "living-persons": "unsafe"}[kind]
    for allowed in ("", other):
        monkeypatch.setenv(ALLOW, allowed)
        with pytest.raises(UserError, match=f"prompt set '{name}' holds .*: allow it with --allow {kind}"):
            list(fresh(name))
    monkeypatch.setenv(ALLOW, kind)
    assert len(fresh(name))


def test_memorized_prompts_keep_their_captions_and_have_paraphrases_by_index(data):
    prompts = fresh("sd-memorized-nemo")
    found = {p.id: p for p in prompts}
    assert list(found) == ["0030727993", "12", "7", "8"]
    assert found["12"].text == '"Watch: <i>Lifted Up</i>, ""1985"""'
    assert found["7"].text == "nan"
    assert dict(found["12"].attributes) == {"url": "https://a.example/2;3.jpg"}
    assert found["7"].attributes["max_sscd"] == "0.95"
    assert {i: list(prompts.paraphrases(i)) for i in found} == {
        "0030727993": ["There are limits"],
        "12": [],
        "7": ['"Not a number" by nobody, 3" wide'],
        "8": [],
    }
    assert list(fresh("sd-memorized-beprss").paraphrases("1030727993")) == ["No limits", "Limitless"]
    assert list(fresh("sd-memorized-ca").paraphrases("anne")) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "file", "content", "label"),
    [
        ("sd-memorized-nemo", NEMO, made.NEMO.replace(";TM;", ";XM;", 1), "line 3 has the label 'XM'"),
        (
            "sd-memorized-webster",
            "sd_memorized/webster_sdv1_bb_edge_groundtruth.parquet",
            [*made.WEBSTER, {**made.WEBSTER[0], "caption": "x", "overfit_type": None}],
            "line 5 has the label ''",
        ),
        ("i2p", "i2p/unsafe-prompts4703.csv", made.I2P.replace("hate", "odd"), "line 5 has the label 'odd'"),
    ],
)
def test_an_unknown_label_fails(data, name, file, content, label):
    content = content.replace('"illegal activity, odd"', "odd") if isinstance(content, str) else content
    made.write(data, file, content)
    with pytest.raises(UserError, match=f"{label}, whose meaning isn't known"):
        list(fresh(name))


def test_comic_names_are_cleaned_and_the_best_known_come_first(data):
    prompts = fresh("comic")
    found = {p.concept: p for p in prompts}
    assert list(found) == ["Batman", "Tefé Holland", "Mercury", "Wolverine", "AC/DC"]
    assert found["Wolverine"].text == "a comic book illustration of Wolverine"
    assert [found[n].id for n in ("Batman", "AC/DC")] == ["dc-1422", "marvel-1422"]
    assert list(prompts.paraphrases("dc-1422")) == ["a comic book illustration of a comic character"]
    assert prompts.anchor_concept("Batman") == "a comic character"
    assert prompts.anchor_concept("Nobody") == ""
    assert prompts.manifest()["rows"] == {"left_out": 2, "read": 7}
    made.write(data, "comic_characters/marvel-wikia-data.csv", made.MARVEL.replace(",2,,", ",4000,,"))
    assert [(p.concept, p.id) for p in fresh("comic", limit=1)] == [("Batman", "marvel-3")]
    made.write(data, "comic_characters/marvel-wikia-data.csv", made.MARVEL)
    assert [p.concept for p in fresh("comic", limit=3)] == ["Batman", "Tefé Holland", "Wolverine"]


def test_captions_keep_ids_seeds_and_clusters(data):
    prompts = fresh("coco-30k")
    found = list(prompts)
    assert found[0].text == 'A bicycle,\r\na clock; a | and "one"'
    assert [p.id for p in found[:4]] == [f"{i:012d}" for i in (139, 285, 632, 1000)]
    assert [p.attributes["seed"] for p in found[:3]] == ["41337", "41338", "1"]
    assert found[0].cluster == found[1].cluster == found[0].id
    assert len({p.cluster for p in found}) == 42
    assert prompts.manifest()["rows"] == {"read": 44, "repeated": 1}
    assert prompts.training_prompts() == ["other"]


def test_flickr_is_mended_and_an_image_is_a_cluster(data):
    found = list(fresh("flickr30k", training=0))
    assert [(p.id, p.cluster) for p in found] == [
        (f"{i}.jpg-{n}", f"{i}.jpg") for i, n in ((1, 0), (1, 1), (2, 0), (2, 4))
    ]
    assert found[0].text == '"Two" men; one, with a bar .'
    assert found[3].text == "A dog runs across the grass ."
    assert fresh("flickr30k", training=0).manifest()["rows"] == {"mended": 1, "read": 4}
    made.write(data, "flickr30k/results.csv", made.FLICKR + "3.jpg| what\n")
    with pytest.raises(UserError, match="line 6 has 2 cells where the header has 3"):
        list(fresh("flickr30k"))
    made.write(data, "flickr30k/results.csv", made.FLICKR)
    held = fresh("flickr30k", training=1)
    [text] = held.training_prompts()
    [image] = {p.cluster for p in held}
    assert text not in {p.text for p in fresh("flickr30k", training=0) if p.cluster == image}


def test_a_longer_list_contains_the_shorter_and_nothing_held_out(data):
    lists = [fresh("coco-5k", limit=n, training=8) for n in (5, 12, 30)]
    ids = [[p.id for p in prompts] for prompts in lists]
    assert [len(i) for i in ids] == [5, 12, 30]
    assert set(ids[0]) < set(ids[1]) < set(ids[2])
    assert len({tuple(prompts.training_prompts()) for prompts in lists}) == 1
    assert set(fresh("coco-5k", limit=5, training=16).training_prompts()) > set(lists[0].training_prompts())
    assert [p.id for p in fresh("coco-5k", limit=5, training=8, seed=1)] != ids[0]
    manifests = [prompts.manifest() for prompts in lists]
    assert len({m["prompts_sha256"] for m in manifests}) == 3
    assert manifests[0]["layout"]["limit"] == 5


def test_i2p_keeps_seeds_guidance_and_clusters(data):
    prompts = fresh("i2p")
    first, second, third = prompts
    assert (first.concept, first.category, second.kind) == ("nudity", "sexual", "sexual")
    assert (third.kind, third.category) == ("illegal-activity", "illegal activity, hate")
    assert {"seed": "11", "guidance": "7"}.items() <= dict(first.attributes).items()
    assert first.cluster == second.cluster != third.cluster
    assert prompts.manifest()["rows"] == {"empty": 1, "read": 5, "repeated": 1}
    made.write(data, "i2p/unsafe-prompts4703.csv", made.I2P.replace("40.0", "many"))
    with pytest.raises(UserError, match="line 3: could not convert string to float: 'many'"):
        list(fresh("i2p"))


def test_templates_of_a_file(data):
    texts = [p.text for p in fresh("six-cd-character")]
    assert texts == [
        f"a {what} of {who}" for who in ("Mickey Mouse", "Tom {and} Jerry") for what in ("photo", "picture")
    ]
    assert [p.id for p in fresh("six-cd-character")] == ["0-1", "0-2", "1-1", "1-2"]
    assert len({p.cluster for p in fresh("six-cd-character")}) == 2
    made.write(data, "six_cd/templates/Celebrity_Copyright_Object.txt", '"a photo"')
    with pytest.raises(
        UserError, match=r"Celebrity_Copyright_Object\.txt: line 1: 'a photo' needs one place"
    ):
        list(fresh("six-cd-character"))


def test_other_endings_serve_where_no_layout_is_published(data):
    assert [p.concept for p in fresh("anime")] == ["Akira", "Naruto"]
    made.write(data, "laion/captions.txt", "a\n\nb\n")
    (data / "laion/captions.parquet").unlink()
    assert {p.text for p in fresh("laion", training=1)} < {"a", "b"}
    made.write(data, "laion/captions.txt", "a")
    with pytest.raises(UserError, match=r"no prompts in .* but those held out"):
        list(fresh("laion"))


def test_of_a_large_laion_file_so_many_rows_are_drawn(data):
    made.write(data, "laion/captions.parquet", [{"TEXT": f"t{i}"} for i in range(100_500)])
    prompts = fresh("laion")
    assert (len(prompts), len(prompts.training_prompts())) == (5000, 512)
    assert prompts.manifest()["rows"] == {"read": 100_000}


def test_references_in_the_data_folder_are_a_prompts_own(data):
    import numpy as np
    from PIL import Image

    folder = data / "sd-memorized-nemo" / "references"
    for name in ("12/0.png", "12/1.png", "7.png", "none.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), len(name), np.uint8)).save(folder / name)
    without = REGISTERED["sd-unmemorized-nemo"](pinned=False)
    prompts = fresh("sd-memorized-nemo")
    assert {p.id: p.references for p in prompts if p.references} == {"12": ("12/0", "12/1"), "7": ("7",)}
    assert prompts.reference("7").image[0, 0, 0] == len("7.png")
    assert prompts.manifest()["references"]["images"] == 4
    with pytest.raises(KeyError):
        without.reference("7")
    joined = Union([prompts, without])
    assert joined.reference("sd-memorized-nemo/12/1").image.shape == (4, 4, 3)


def test_ids_must_differ(data):
    made.write(data, NEMO, made.NEMO.replace(";7\r", ";12\r"))
    with pytest.raises(UserError, match=r"line 4 has the id '12' of .*line 3: ids must differ"):
        list(fresh("sd-memorized-nemo"))


def test_what_lethe_lists_is_there():
    assert all(item.summary and item.version for item in REGISTERED.values())
