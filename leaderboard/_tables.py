"""The per-image table beside a row: its plain columns only, not the feature vectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

TABLE = "images.parquet"
LABEL, SIMILARITY = "fbmem_label", "copy_mini_similarity"
MEMORIZED_LABELS = ("VM", "FM", "BM")


def read_table(folder: Path) -> pd.DataFrame | None:
    """The table of a row's folder, without nested columns; None where there is none or it can't be read.

    A row whose table is damaged keeps its place on the page: it only loses its pictures and its rank.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / TABLE
    if not path.is_file():
        return None
    try:
        schema = pq.read_schema(path)
        flat = [f.name for f in schema if not pa.types.is_nested(f.type)]
        table: pd.DataFrame = pq.read_table(path, columns=flat).to_pandas()
    except (OSError, pa.ArrowException):
        return None
    if not {"prompt_id", "index"} <= set(table.columns):
        return None
    return table.assign(prompt_id=table["prompt_id"].astype(str), index=table["index"].astype(int))
