"""Ordinary captions and prompts, to see what a method costs on them and to fit methods on.

Which captions are drawn, and which are held out to fit on, is ours: the papers say "5,000 randomly selected".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from lethebench.promptfiles.readers import Table
from lethebench.promptfiles.sets import FilePromptSet
from lethebench.promptfiles.specs import Columns, Layout
from lethebench.prompts import Role, plainly
from lethebench.registry import PROMPT_SETS
from lethebench.seeding import derive_seed

_ESD = "coco/esd_coco_30k.csv"
_NEMO = "sd_memorized/nemo_coco2014_val_10000.csv"
_UNTOLD = re.compile(r"\s*(\d)\s+(.*)", re.DOTALL)
_ESD_LAYOUT = Layout(
    columns=Columns(prompt="prompt", id="image_id", seed="evaluation_seed"),
    role=Role.NEUTRAL,
    kind="caption",
)
_NEMO_LAYOUT = Layout(
    separator=";", columns=Columns(prompt="Caption", id="Index"), role=Role.NEUTRAL, kind="caption"
)


@PROMPT_SETS.register
class Coco5k(FilePromptSet):
    """5,000 captions of COCO 2014's validation images from ESD's list, and 512 others to fit on."""

    name = "coco-5k"
    summary = "5,000 COCO captions (of ESD's 30,000), and 512 others held out to fit methods on"
    files = (_ESD,)
    layout = _ESD_LAYOUT.model_copy(update={"limit": 5000, "training": 512})


class _WholeCoco(FilePromptSet):
    """A whole list of COCO captions; those to fit on are captions of another list that it lacks."""

    spare: Layout
    """The layout of the second file."""

    @cached_property
    def _spare(self) -> list[str]:
        asked = {plainly(prompt.text) for prompt in self}
        other, column = self.read(self.files[1], separator=self.spare.separator), self.spare.columns.prompt
        found = {text for row in other.rows if plainly(text := row.cells[str(column)]) not in asked}
        return sorted(found, key=lambda text: derive_seed("prompt set", self.name, "training", text))[:512]

    def training_prompts(self) -> Sequence[str]:
        """512 captions of the other list, in a drawn order."""
        return self._spare


@PROMPT_SETS.register
class Coco30k(_WholeCoco):
    """The 30,000 captions of ESD, each with its evaluation seed."""

    name = "coco-30k"
    summary = "30,000 COCO captions (ESD), and 512 others (of NeMo's) to fit methods on"
    files = (_ESD, _NEMO)
    layout, spare = _ESD_LAYOUT, _NEMO_LAYOUT


@PROMPT_SETS.register
class Coco10k(_WholeCoco):
    """NeMo's 10,000 captions for FID; 34 repeat others and count once."""

    name = "coco-10k"
    summary = "9,966 COCO captions (NeMo's 10,000), and 512 others (of ESD's) to fit methods on"
    files = (_NEMO, _ESD)
    layout, spare = _NEMO_LAYOUT, _ESD_LAYOUT


@PROMPT_SETS.register
class Flickr30k(FilePromptSet):
    """5,000 captions of Flickr30k, and 512 of other images to fit on; an image's captions are a cluster.

    ``results.csv`` separates cells by ``|`` and blanks. Its row 19999 lacks the separator between number and
    caption, which is put back.
    """

    name = "flickr30k"
    summary = "5,000 captions of Flickr30k, and 512 of other images held out to fit methods on"
    files = ("flickr30k/results.csv",)
    layout = Layout(
        separator="|",
        blanks=True,
        quoting=False,
        columns=Columns(prompt="comment", id="key", cluster="image_name"),
        role=Role.NEUTRAL,
        kind="caption",
        limit=5000,
        training=512,
    )

    def mend(self, cells: list[str], columns: int) -> Sequence[str] | None:
        """``name | 4 caption`` as ``name | 4 | caption``."""
        found = _UNTOLD.fullmatch(cells[-1]) if len(cells) == columns - 1 else None
        return None if found is None else [*cells[:-1], found[1], found[2]]

    def tables(self) -> Sequence[Table]:
        """The table with image and caption number as id."""
        table = self.read(self.files[0])
        return [
            table.derived(lambda cells: {"key": f"{cells['image_name']}-{cells['comment_number'].strip()}"})
        ]


@PROMPT_SETS.register
class Laion(FilePromptSet):
    """5,000 LAION captions of a file that you give, and 512 others to fit on.

    Of more than 100,000 rows so many are drawn first: a shard of LAION-400M has 13 million.
    """

    name = "laion"
    summary = "5,000 captions of a LAION file that you give, and 512 others held out to fit methods on"
    files = ("laion/captions.parquet",)
    layout = Layout(role=Role.NEUTRAL, kind="caption", empty="skip", limit=5000, training=512)

    def tables(self) -> Sequence[Table]:
        """The file's table, or of a large one 100,000 rows."""
        return [self.read(self.files[0], at_most=100_000)]


@PROMPT_SETS.register
class PartiPrompts(FilePromptSet):
    """The 1,632 prompts of PartiPrompts, with their category and challenge."""

    name = "partiprompts"
    summary = "1,632 prompts of many categories and difficulties (PartiPrompts)"
    files = ("neutral/PartiPrompts.tsv",)
    layout = Layout(
        columns=Columns(prompt="Prompt", category="Category"),
        attributes={"challenge": "Challenge"},
        role=Role.NEUTRAL,
        kind="prompt",
    )
