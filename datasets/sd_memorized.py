"""Prompts that Stable Diffusion is known to have memorized, with their unmemorized controls and paraphrases.

The labels are their authors': NeMo's (Hintersdorf et al., NeurIPS 2024) VM, verbatim, and TM, template; and
those of Webster (arXiv 2305.08694) MV, matching verbatim, RV, retrieved verbatim, TV, template verbatim. How
often an image was duplicated isn't known. Prompts are LAION captions as they are, with their HTML and stray
quotes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from lethebench.promptfiles.readers import Row, Table
from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Columns, Layout, Meaning
from lethebench.prompts import Role
from lethebench.registry import PROMPT_SETS

_NEMO = Columns(prompt="Caption", id="Index")
_MEMORIZED = Meaning(role=Role.TRIGGER)


@PROMPT_SETS.register
class MemorizedNemo(FilePromptSet):
    """NeMo's 500 prompts of Stable Diffusion 1.4, each with the label VM (112) or TM (388).

    ``mean_sscd`` and ``max_sscd`` are its authors' figures, missing for 13 rows. Paraphrases are the rewrites
    in a public fork, joined by index: six prompts have none, and one rewrite that says the same is no
    paraphrase.
    """

    name = "sd-memorized-nemo"
    summary = "500 prompts that Stable Diffusion 1 memorized, labelled VM or TM (NeMo), with paraphrases"
    files = (
        "sd_memorized/nemo_memorized_laion_prompts.csv",
        "sd_memorized/nemofork_memorized_laion_prompts_rewrite_1.csv",
    )
    layout = Layout(
        separator=";",
        columns=_NEMO.model_copy(update={"label": "type"}),
        labels={"VM": _MEMORIZED, "TM": _MEMORIZED},
        attributes={"url": "URL", "mean_sscd": "mean_sscd", "max_sscd": "max_sscd"},
    )

    def rewordings(self) -> Mapping[str, Sequence[str]]:
        """The fork's rewrites by index, in a file that doesn't quote."""
        rows = self.read(self.files[1], quoting=False).rows
        return {row.cells["Index"]: (row.cells["Caption"],) for row in rows}


@PROMPT_SETS.register
class UnmemorizedNemo(FilePromptSet):
    """NeMo's 500 LAION prompts that Stable Diffusion 1.4 doesn't memorize."""

    name = "sd-unmemorized-nemo"
    summary = "500 LAION captions that Stable Diffusion 1 did not memorize (NeMo): controls"
    files = ("sd_memorized/nemo_unmemorized_laion_prompts.csv",)
    layout = Layout(
        separator=";", columns=_NEMO, attributes={"url": "URL"}, role=Role.CONTROL, kind="unmemorized"
    )


@PROMPT_SETS.register
class AdditionalNemo(FilePromptSet):
    """500 more LAION captions of a fork of NeMo: half are held out to fit on (ours)."""

    name = "sd-additional-nemo"
    summary = "500 ordinary LAION captions (a fork of NeMo), 256 of them held out to fit methods on"
    files = ("sd_memorized/nemofork_additional_laion_prompts_500.csv",)
    layout = Layout(
        separator=";",
        columns=_NEMO,
        attributes={"url": "URL"},
        role=Role.NEUTRAL,
        kind="caption",
        training=256,
    )


@PROMPT_SETS.register
class MemorizedWen(FilePromptSet):
    """The 500 prompts of Wen et al. (ICLR 2024): NeMo's, without labels."""

    name = "sd-memorized-wen"
    summary = "500 prompts that Stable Diffusion 1 memorized (Wen et al.), without labels"
    files = ("sd_memorized/wen_sdv1_500_memorized.jsonl",)
    layout = Layout(
        columns=Columns(prompt="caption", id="index"),
        attributes={"url": "url"},
        role=Role.TRIGGER,
        kind="memorized",
    )


@PROMPT_SETS.register
class MemorizedWebster(FilePromptSet):
    """Webster's prompts of Stable Diffusion 1 (black-box attack): MV, RV, TV, and N where nothing matched."""

    name = "sd-memorized-webster"
    summary = "prompts that Stable Diffusion 1 memorized, labelled MV, RV or TV (Webster)"
    files = ("sd_memorized/webster_sdv1_bb_edge_groundtruth.parquet",)
    layout = Layout(
        columns=Columns(prompt="caption", label="overfit_type"),
        labels={
            "MV": _MEMORIZED,
            "RV": _MEMORIZED,
            "TV": _MEMORIZED,
            "N": Meaning(role=Role.CONTROL, kind="unmemorized"),
        },
        attributes={"url": "url"},
    )


@PROMPT_SETS.register
class MemorizedBePrss(FilePromptSet):
    """The four prompts that BE-PRSS ships, each with 25 paraphrases."""

    name = "sd-memorized-beprss"
    summary = "4 prompts that Stable Diffusion 1 memorized, with 25 paraphrases each (BE-PRSS)"
    files = ("sd_memorized/beprss_sdv1_500_mem_groundtruth_repeated_withss.jsonl",)
    layout = Layout(
        columns=Columns(prompt="caption", id="index"),
        attributes={"url": "url"},
        role=Role.TRIGGER,
        kind="memorized",
    )

    def rewordings(self) -> Mapping[str, Sequence[str]]:
        """The columns ``caption1``, ``caption2``, ..."""
        return {
            row.cells["index"]: tuple(
                text for name, text in row.cells.items() if name.removeprefix("caption").isdigit() and text
            )
            for row in self.read(self.files[0]).rows
        }


CA_CAPTIONS = {
    "anne": "Ann Graham Lotz",
    "bloodborne": "Sony Boss Confirms Bloodborne Expansion is Coming",
    "letterm": "A painting with letter M written on it Canvas Wall Art Print",
    "longdark": "<i>The Long Dark</i> Gets First Trailer, Steam Early Access",
    "lukas": "Portrait of Tiger in black and white by Lukas Holas",
    "marvel": "Captain Marvel Exclusive Ccxp Poster Released Online By Marvel",
    "orleans": "New Orleans House Galaxy Case",
    "vangoghcafe": "VAN GOGH CAFE TERASSE copy.jpg",
}
"""The memorized captions by the names of their files.

Source: nupurkmr9/concept-ablation, compvis/scripts/memorization.sh.
"""


@PROMPT_SETS.register
class MemorizedAblation(FilePromptSet):
    """The eight captions that concept ablation removes, each with 30 paraphrases, one a line."""

    name = "sd-memorized-ca"
    summary = "8 prompts that Stable Diffusion 1 memorized, with 30 paraphrases each (concept ablation)"
    files = tuple(f"sd_memorized/conceptablation_{name}_mem.txt" for name in CA_CAPTIONS)
    layout = Layout(columns=Columns(id="id"), role=Role.TRIGGER, kind="memorized")

    def tables(self) -> Sequence[Table]:
        """The captions, which their repository keeps in a script."""
        rows = (
            Row(line, {"id": key, "text": text}) for line, (key, text) in enumerate(CA_CAPTIONS.items(), 1)
        )
        return [Table(self.path(self.files[0]), ("id", "text"), tuple(rows))]

    def rewordings(self) -> Mapping[str, Sequence[str]]:
        """Each file's lines."""
        return {
            PurePosixPath(name).stem.split("_")[1]: [row.cells["text"] for row in self.read(name).rows]
            for name in self.files
        }


@PROMPT_SETS.register
class MemorizedRen1(FilePromptSet):
    """The 345 prompts of Stable Diffusion 1 of Ren et al. (ECCV 2024): all among NeMo's."""

    name = "sd1-mem-ren"
    summary = "345 prompts that Stable Diffusion 1 memorized (Ren et al.)"
    files = ("sd_memorized/memattn_sd1_mem345.txt",)
    layout = Layout(role=Role.TRIGGER, kind="memorized")


@PROMPT_SETS.register
class MemorizedRen2(FilePromptSet):
    """The 219 prompts of Stable Diffusion 2 of Ren et al. (ECCV 2024)."""

    name = "sd2-mem-ren"
    summary = "219 prompts that Stable Diffusion 2 memorized (Ren et al.)"
    files = ("sd_memorized/memattn_sd2_mem219.txt",)
    layout = Layout(role=Role.TRIGGER, kind="memorized")


@PROMPT_SETS.register
class UnmemorizedRen(FilePromptSet):
    """The 500 prompts written for Ren et al. (ECCV 2024), which no training caption is like."""

    name = "nomem-ren"
    summary = "500 written prompts that no model memorized (Ren et al.): controls"
    files = ("sd_memorized/memattn_group_nomem500.txt",)
    layout = Layout(role=Role.CONTROL, kind="unmemorized")
