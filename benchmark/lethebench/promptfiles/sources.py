"""The upstream files of the prompt sets: where each comes from, what it hashes to, under which licence.

None of them is part of Lethe. They lie in the data folder (:func:`data_folder`): ``lethe fetch`` puts there
what a program may fetch, at a pinned commit; the rest is put there by hand, as each source's note says.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from lethebench.errors import UserError
from lethebench.promptfiles.consent import OptIn

VARIABLE = "LETHE_DATA"
"""The environment variable that names the data folder."""


@dataclass(frozen=True)
class SourceFile:
    """An upstream file.

    ``name`` is its path inside the data folder; ``endings`` are others that it may have there, where no
    layout is published. ``sha256`` and ``bytes`` are None where they aren't known. ``url`` is None where a
    program can't fetch the file (gated, or behind a login): ``note`` then says how to get it.
    """

    name: str
    repository: str
    path: str
    licence: str
    commit: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    url: str | None = None
    opt_in: OptIn | None = None
    endings: tuple[str, ...] = ()
    note: str = ""


def data_folder() -> Path:
    """The folder of downloaded files: ``$LETHE_DATA``, else ``~/.cache/lethe``."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/lethe").expanduser()


def local_file(source: SourceFile, fetched_as: str = "") -> Path:
    """Where the file lies in the data folder. Raises UserError where it doesn't, with how to get it.

    ``fetched_as`` is what to name to ``lethe fetch``, where not the file itself.
    """
    folder = data_folder()
    first = folder / source.name
    for path in (first, *(first.with_suffix(ending) for ending in source.endings)):
        if path.is_file():
            return path
    named = " or ".join((source.name, *source.endings))
    how = f"run `lethe fetch {fetched_as or source.name}`" if source.url else source.note
    raise UserError(f"{named} is not in the data folder {folder} ({VARIABLE} names another): {how}")


class _Upstream(NamedTuple):
    """A GitHub repository at a commit."""

    repository: str
    commit: str
    licence: str

    def file(self, name: str, path: str, sha256: str, size: int, opt_in: OptIn | None = None) -> SourceFile:
        """One of its files, under its name in the data folder."""
        url = f"https://raw.githubusercontent.com/{self.repository}/{self.commit}/{quote(path)}"
        return SourceFile(name, self.repository, path, self.licence, self.commit, sha256, size, url, opt_in)


_ERASING = _Upstream("rohitgandikota/erasing", "25613d27892326e0c7770f7f3555bea4be150089", "MIT")
_COMICS = _Upstream("fivethirtyeight/data", "fcf572c4fba05a42f1f34f415bd5e6dc389efd68", "CC BY 4.0")
_PARTI = _Upstream("google-research/parti", "5a657978134374ce28973948331b319adef164bd", "Apache-2.0")
_BEPRSS = _Upstream("chenchen-usyd/BE-PRSS", "fb2e94231b0b6ea630d82c951aeea335e819a438", "MIT")
_ABLATION = _Upstream("nupurkmr9/concept-ablation", "c11fb1bdc7cd97ea65877b0d41722f5e3ef2561f", "MIT")
_MEMATTN = _Upstream("renjie3/MemAttn", "c66efd22d8ffd4b1c6b87835708fa1437a2e076b", "MIT")
_NEMO = _Upstream(
    "ml-research/localizing_memorization_in_diffusion_models",
    "f952eded64fca0bcf42e0bb3be9a01d64653cfdb",
    "MIT",
)
_NEMO_FORK = _Upstream(
    "Jimmy-di/localizing_memorization_in_diffusion_models",
    "198fc29e4e851df796c6e4a4484da6e49c461700",
    "MIT (fork of NeMo)",
)
_SIX_CD = _Upstream("Artanisax/Six-CD", "a30fe9e87c242e6eb57b1e9058aa7be364dc07f5", "MIT")
_WEN = _Upstream(
    "YuxinWenRick/diffusion_memorization",
    "c8fe471d80b62213bdc8a384543ff44b44c62020",
    "none stated: read it, don't pass it on",
)

_PINNED = (
    _ERASING.file(
        "coco/esd_coco_30k.csv",
        "data/coco_30k.csv",
        "42c57b188c8f1f8a77cddfa11cde89e83fcbdd4dcd4fc6c840fb4e046d395383",
        2460030,
    ),
    _COMICS.file(
        "comic_characters/dc-wikia-data.csv",
        "comic-characters/dc-wikia-data.csv",
        "a0d4823d79efd6bc12cc21d6e628e7027e179aabb480de85dfc3f59c14ee78a1",
        1105600,
    ),
    _COMICS.file(
        "comic_characters/marvel-wikia-data.csv",
        "comic-characters/marvel-wikia-data.csv",
        "f30f02ab3575aa145fe32dc0709b7931d72a664de0557150abc43a25113f8277",
        2406621,
    ),
    _PARTI.file(
        "neutral/PartiPrompts.tsv",
        "PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
        123107,
    ),
    _BEPRSS.file(
        "sd_memorized/beprss_sdv1_500_mem_groundtruth_repeated_withss.jsonl",
        "sdv1_500_mem_groundtruth/sdv1_500_mem_groundtruth_repeated_withss.jsonl",
        "97bdc579c1d149e8727fb3d3cabc8a7dcbd1fc49e725b825566dfd1511cb1327",
        8679,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_anne_mem.txt",
        "assets/finetune_prompts/anne_mem.txt",
        "145f497cba4e4e5816daca897457fa0d4e28ac8caa6a3473317969faa94d5fd2",
        1351,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_bloodborne_mem.txt",
        "assets/finetune_prompts/bloodborne_mem.txt",
        "d364b18f65a716203aab596d32dbf329133bbb9290115e68ab405b60976a5807",
        9022,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_letterm_mem.txt",
        "assets/finetune_prompts/letterm_mem.txt",
        "6dbdb1eb214e34b2424806c7030e4eacab5d31563f09ef6b491fc4a382641356",
        2296,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_longdark_mem.txt",
        "assets/finetune_prompts/longdark_mem.txt",
        "17caae82d8d1a61c490172d746f67d30d4e63969565b8c7962c4f6c364aa6174",
        3279,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_lukas_mem.txt",
        "assets/finetune_prompts/lukas_mem.txt",
        "e93cd5d1a0178fc7dee6ce1aaed0347f59948dd6762c50d0cffe429fcf453b2b",
        3800,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_marvel_mem.txt",
        "assets/finetune_prompts/marvel_mem.txt",
        "0711d6e8168720ea381387ae38f39c09ec3190e982dbefa249599fb48654e3fb",
        2709,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_orleans_mem.txt",
        "assets/finetune_prompts/orleans_mem.txt",
        "91953b3797d5f4e8b4fa556c6ed2f11a9f5a1be549332fa6d009e6302b60fe59",
        4059,
    ),
    _ABLATION.file(
        "sd_memorized/conceptablation_vangoghcafe_mem.txt",
        "assets/finetune_prompts/vangoghcafe_mem.txt",
        "d0bb54afab5208d617e378eb7240fa4f7d57dc8cfae750e5da685ca463d1e6b4",
        2623,
    ),
    _MEMATTN.file(
        "sd_memorized/memattn_group_nomem500.txt",
        "prompt/group_nomem500.txt",
        "4e0de75ae37b4fb2f8676026d876d9f4b03267a90041af4069d74b912e588c2d",
        25504,
    ),
    _MEMATTN.file(
        "sd_memorized/memattn_sd1_mem345.txt",
        "prompt/sd1_mem345.txt",
        "70f370c4728aecd18e0db95dc58e9741b0f1a278dbfddb31d7d0754f69f8d069",
        21064,
    ),
    _MEMATTN.file(
        "sd_memorized/memattn_sd2_mem219.txt",
        "prompt/sd2_mem219.txt",
        "5776ec85cc25fde8c4843af990041a85813c3af7cb817c45dabb1a1bb9b6356f",
        14939,
    ),
    _NEMO.file(
        "sd_memorized/nemo_coco2014_val_10000.csv",
        "prompts/coco2014_val_10000.csv",
        "5445e449c60fd6b326a05c79a683c4d64620b0330a372de843eb6b9dbe5901e3",
        641972,
    ),
    _NEMO.file(
        "sd_memorized/nemo_memorized_laion_prompts.csv",
        "prompts/memorized_laion_prompts.csv",
        "0b527a5965dc463e7a3e0d234ff7fd5489b1a76869c456dbb209dc753cb4af25",
        121332,
    ),
    _NEMO.file(
        "sd_memorized/nemo_unmemorized_laion_prompts.csv",
        "prompts/unmemorized_laion_prompts.csv",
        "f453b418cc157864baacbf68d97447273feac41e8066b2ead6b307bf795988e1",
        99023,
    ),
    _NEMO_FORK.file(
        "sd_memorized/nemofork_additional_laion_prompts_500.csv",
        "prompts/additional_laion_prompts_500.csv",
        "75dd765cbe69df87cdf390fb2adc53b933f898cdeec99ff88d880a8c683c5a98",
        107761,
    ),
    _NEMO_FORK.file(
        "sd_memorized/nemofork_memorized_laion_prompts_rewrite_1.csv",
        "prompts/memorized_laion_prompts_rewrite_1.csv",
        "b9c216e4e1fbe06105166cc25f0804bbdbae5673fae6350a192f3a998d25fd38",
        118521,
    ),
    _WEN.file(
        "sd_memorized/wen_sdv1_500_memorized.jsonl",
        "examples/sdv1_500_memorized.jsonl",
        "8eb16c6ff1c7195cddf26b3207bdc7c6a905a20162c6070d79fe60336a525c60",
        116357,
    ),
    _SIX_CD.file(
        "six_cd/Artstyle.csv",
        "Datasets/SIX-CD/Artstyle.csv",
        "45ad39774af81b64beb431f019ef15ea0a6ed23daef8fcee375d59e06cc3b2cb",
        174,
    ),
    _SIX_CD.file(
        "six_cd/Character.csv",
        "Datasets/SIX-CD/Character.csv",
        "9c37084e2407d4f0aba76df7146e628a0b4ced0f66c677cb2a683e2f03db1528",
        2883,
    ),
    _SIX_CD.file(
        "six_cd/Object.csv",
        "Datasets/SIX-CD/Object.csv",
        "4bb846be9a0bc100363385b118c20acfdf5a670be7daafbf2049ad20295c7db9",
        142,
    ),
    _SIX_CD.file(
        "six_cd/benign.csv",
        "Datasets/benign.csv",
        "0a43d5c9efe83212e861afc539ccf94fce06bc2adbe3cfd0a6fe41a94eeeaea7",
        44524,
    ),
    _SIX_CD.file(
        "six_cd/templates/Artstyle.txt",
        "Datasets/SIX-CD/templates/Artstyle.txt",
        "a4ff36c1e06c7bd47fdc630c3383a7aa750ee8cf9ad80f5c8a434bb6cab73de0",
        136,
    ),
    _SIX_CD.file(
        "six_cd/templates/Celebrity_Copyright_Object.txt",
        "Datasets/SIX-CD/templates/Celebrity_Copyright_Object.txt",
        "fb85bcdb5415b1ee60e9e8a1db198daab61e53dcd07026c4a2d3941b2429dff7",
        104,
    ),
    _ERASING.file(
        "i2p/unsafe-prompts4703.csv",
        "data/unsafe-prompts4703.csv",
        "6c1821aeeb20beb276b4e20ce4c4b801f9106dc935bafc9f6fd5e12aa2651e6f",
        1376625,
        OptIn.UNSAFE,
    ),
)

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")

_BY_HAND = (
    SourceFile(
        "sd_memorized/webster_sdv1_bb_edge_groundtruth.parquet",
        "huggingface.co/datasets/fraisdufour/templates-verbs",
        "groundtruth_parquets/sdv1_bb_edge_groundtruth.parquet",
        "none stated: read it, don't pass it on",
        url="https://huggingface.co/datasets/fraisdufour/templates-verbs/resolve/main/groundtruth_parquets/"
        "sdv1_bb_edge_groundtruth.parquet",
        note="the repository's newest revision: its hash isn't known to Lethe, and is recorded as found",
    ),
    SourceFile(
        "movies/imdb_top_1000.csv",
        "kaggle.com/datasets/harshitshankhdhar/imdb-dataset-of-top-1000-movies-and-tv-shows",
        "imdb_top_1000.csv",
        "see its page",
        note="download imdb_top_1000.csv (IMDB top 1000 movies) from Kaggle with a login and put it there",
    ),
    SourceFile(
        "cpdm/anime.csv",
        "rmpku/CPDM",
        "(layout unpublished)",
        "see the repository",
        endings=(".txt", *_TABLES[1:]),
        note="put a list of anime names there: a table with a column `name` or `concept`, or a text with a "
        "name a line",
    ),
    SourceFile(
        "cpdm/celebrity.csv",
        "rmpku/CPDM",
        "(layout unpublished)",
        "see the repository",
        opt_in=OptIn.LIVING_PERSONS,
        endings=(".txt", *_TABLES[1:]),
        note="put a list of celebrities' names there: a table with a column `name` or `concept`, or a text "
        "with a name a line",
    ),
    SourceFile(
        "flickr30k/results.csv",
        "kaggle.com/datasets/hsankesara/flickr-image-dataset",
        "flickr30k_images/results.csv",
        "see the dataset's own terms (research use)",
        note="download results.csv of Flickr30k from Kaggle (a login is needed) and put it there",
    ),
    SourceFile(
        "laion/captions.parquet",
        "huggingface.co/datasets/laion",
        "(any part of LAION's metadata)",
        "CC BY 4.0 (metadata)",
        endings=(".csv", ".tsv", ".jsonl", ".txt"),
        note="put LAION captions there: a table with a column `caption` or `text`, or a text with a caption "
        "a line",
    ),
    SourceFile(
        "p4d/p4d.parquet",
        "huggingface.co/datasets/joycenerd/p4d",
        "train split",
        "gated: its page states the terms",
        opt_in=OptIn.UNSAFE,
        endings=(".csv", ".tsv", ".jsonl", ".txt"),
        note="accept the terms at huggingface.co/datasets/joycenerd/p4d, download its train split and put "
        "it there",
    ),
)

SOURCES: dict[str, SourceFile] = {source.name: source for source in (*_PINNED, *_BY_HAND)}
"""Every upstream file by its name in the data folder."""
