"""The commands ``lethe fetch`` and ``lethe index``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lethebench.errors import UserError


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...", help="A file, a prompt set, a model, or a hub id.", show_default=False
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is, and what is here.")] = False,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="Folder for files (else LETHE_DATA or ~/.cache/lethe) and models (else the hub's cache).",
        ),
    ] = None,
    allow: Annotated[str, typer.Option("--allow", help="Allow unsafe or living-persons (or both).")] = "",
    revision: Annotated[str | None, typer.Option("--revision", help="Of a hub id: a commit or tag.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Download prompt files and models, checked against their hashes; goes on where it was stopped."""
    from lethebench import fetching
    from lethebench.promptfiles import consent, sources

    if list_ == bool(names):
        raise UserError("say what to fetch: lethe fetch NAME; `lethe fetch --list` shows what there is")
    if to is not None:
        os.environ[sources.VARIABLE] = str(to)
    if allow:
        consent.allow(allow)
    if names:
        done = fetching.fetch(names, to=to, revision=revision)
        print(json.dumps(dict(done), default=str) if json_ else "\n".join(f"{n}  {path}" for n, path in done))
        return
    items = fetching.known_items()
    if json_:
        print(json.dumps([asdict(item) for item in items], indent=1))
        return
    for kind in dict.fromkeys(item.kind for item in items):
        print(f"{kind}s:")
        print("\n".join(f"  {item}" for item in items if item.kind == kind))


def index(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    descriptor: Annotated[str, typer.Option("--descriptor", help="sscd or copy-mini.")],
    out: Annotated[Path, typer.Option("--out", help="The index file.")] = Path("index.safetensors"),
    table: Annotated[
        Path | None,
        typer.Option("--table", help="CSV or JSONL: file, and id, caption (or prompt), duplicates if known."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the metric: KEY=VALUE (preset, path, device)."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out images that can't be read.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")] = False,
) -> None:
    """Describe images once, so that metrics can compare with them where they may not be passed on."""
    from lethebench.cli import _overrides
    from lethebench.indexing import build_index, describing_metric, print_built

    metric = describing_metric(descriptor, _overrides(settings))
    built = build_index(images, out, metric, table=table, skip_unreadable=skip_unreadable)
    if json_:
        print(json.dumps(built.as_dict()))
    else:
        print_built(built)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog="Example: lethe fetch sd_memorized/nemo_memorized_laion_prompts.csv")(fetch)
    app.command(
        epilog="Example: lethe index my-images --descriptor sscd --set preset=nemo-320 "
        "--out ~/.cache/lethe/sd-memorized-nemo/references/sscd.safetensors"
    )(index)
