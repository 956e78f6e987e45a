"""Make a reference file of FID and KID: ``python -m lethebench.metrics.frechet FOLDER OUT.npz``."""

from __future__ import annotations

import argparse
import sys

from lethebench.errors import UserError
from lethebench.metrics.frechet import write_reference
from lethebench.metrics.frechet._features import KINDS


def main(arguments: list[str] | None = None) -> int:
    """Write the features of the images of a folder; 2 where it can't."""
    parser = argparse.ArgumentParser(prog="python -m lethebench.metrics.frechet", description=__doc__)
    parser.add_argument("folder", help="folder of images")
    parser.add_argument("out", help="the .npz file to write")
    parser.add_argument("--features", default="inception", choices=list(KINDS))
    parser.add_argument("--resizer", default="clean", help="clean or legacy-tensorflow")
    parser.add_argument("--path", default="", help="the weights file")
    parser.add_argument("--sha256", default="", help="what the weights file's SHA-256 must be")
    parser.add_argument("--device", default="cpu")
    given = vars(parser.parse_args(arguments))
    try:
        print(write_reference(given.pop("folder"), given.pop("out"), **given))
    except UserError as error:
        print(f"lethe: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
