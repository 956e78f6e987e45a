"""Tables are read as they are written, and what can't be read is told in one line."""

from __future__ import annotations

import pytest
from promptfiles import made

from lethebench.errors import UserError
from lethebench.promptfiles.readers import format_of, read


def cells(table, column):
    return [row.cells[column] for row in table.rows]


def test_a_csv_keeps_every_cell_as_text(tmp_path):
    table = read(made.write(tmp_path, "a.csv", made.NEMO), "csv", separator=";")
    assert table.columns == ("", "Caption", "URL", "type", "mean_sscd", "max_sscd", "Index")
    assert cells(table, "Caption") == [
        "The No Limits, or None",
        '"Watch: <i>Lifted Up</i>, ""1985"""',
        "nan",
        "Null",
    ]
    assert cells(table, "Index") == ["0030727993", "12", "7", "8"]
    assert cells(table, "mean_sscd") == ["0.83", "", "0.9", "0.1"]
    assert cells(table, "URL")[1] == "https://a.example/2;3.jpg"


def test_rows_are_not_lines_and_their_line_is_known(tmp_path):
    table = read(made.write(tmp_path, "a.csv", "\ufeff" + made.COCO), "csv")
    assert table.columns[0] == "image_id"
    assert len(table.rows) == 44
    assert [row.line for row in table.rows[:4]] == [2, 4, 6, 7]
    assert table.rows[0].cells["prompt"] == 'A bicycle,\r\na clock; a | and "one"'
    assert table.rows[2].cells["prompt"] == "A dog.\x0b\x1c still one line"
    assert table.rows[0].cells["image_id"] == "000000000139"


def test_a_tsv_does_not_quote(tmp_path):
    table = read(made.write(tmp_path, "a.tsv", made.PARTI), "tsv")
    assert cells(table, "Prompt") == ["bond", '"Hello, world" in neon']
    assert cells(table, "Note") == ["Biology-inspired concepts", ""]


def test_lines_end_at_line_feeds_alone(tmp_path):
    table = read(made.write(tmp_path, "a.txt", made.LINES), "lines")
    assert cells(table, "text") == ["A\x0bB\x1d and \x00C", "None", '"Watch", the \u2028 end']
    again = read(made.write(tmp_path, "b.txt", made.LINES + "\r\n"), "lines")
    assert cells(again, "text") == cells(table, "text")


def test_jsonl_numbers_stay_as_written_and_null_is_empty(tmp_path):
    text = '{"caption": "a", "index": 1030727993, "x": 1e3, "y": NaN}\n\n{"caption": "b", "index": null, "z": [1]}\n'
    table = read(made.write(tmp_path, "a.jsonl", text), "jsonl")
    assert cells(table, "index") == ["1030727993", ""]
    assert cells(table, "x") == ["1e3", ""]
    assert cells(table, "y") == ["", ""]
    assert cells(table, "z") == ["", '["1"]']
    assert [row.line for row in table.rows] == [1, 3]


def test_parquet_rows_read_as_jsonl_rows_do(tmp_path):
    rows = [
        {"caption": "a", "n": 12, "score": float("nan"), "seeds": [1, 2]},
        {"caption": None, "n": 13, "score": 0.5, "seeds": None},
    ]
    table = read(made.write(tmp_path, "a.parquet", rows), "parquet")
    assert cells(table, "caption") == ["a", ""]
    assert cells(table, "n") == ["12", "13"]
    assert cells(table, "score") == ["", "0.5"]
    assert cells(table, "seeds") == ["[1, 2]", ""]


def test_of_a_large_parquet_file_rows_are_drawn(tmp_path):
    path = made.write(tmp_path, "a.parquet", [{"caption": f"c{i}"} for i in range(200_001)])
    drawn = read(path, "parquet", at_most=1000)
    numbers = [row.line for row in drawn.rows]
    assert len(set(numbers)) == 1000
    assert numbers == sorted(numbers)
    assert cells(drawn, "caption") == [f"c{number - 1}" for number in numbers]
    assert all(250 < sum(low < n <= low + 66_667 for n in numbers) < 420 for low in (0, 66_667, 133_334))
    assert drawn == read(path, "parquet", at_most=1000)
    assert read(path, "parquet", at_most=200_001) == read(path, "parquet")


def test_ragged_rows_fail_are_mended_or_left_out(tmp_path):
    path = made.write(tmp_path, "a.csv", "a,b\n1,2\n\n3\n4,5\n")
    with pytest.raises(UserError, match=r"a\.csv: line 4 has 1 cells where the header has 2: mend it"):
        read(path, "csv")
    assert [row.line for row in read(path, "csv", leave_out_ragged=True).rows] == [2, 5]
    assert read(path, "csv", leave_out_ragged=True).left_out == 1
    mended = read(path, "csv", mend=lambda row, n: [*row, "x"])
    assert (cells(mended, "b"), mended.mended) == (["2", "x", "5"], 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer, not the file"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid",
            "is a git-lfs pointer, not the file",
        ),
        ("a.parquet", b"PAR1 and more", "is not a Parquet file that can be read"),
        ("a.csv", b"", "is empty: get it again"),
        ("a.txt", "\ufeff\n".encode(), "is empty: get it again"),
        ("a.csv", b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8: save the file as UTF-8 text"),
        (
            "a.csv",
            b'a,b\n1,2\n"x,3\n4,5\n',
            r"the row from line 3 on can't be read \(unexpected end of data\)",
        ),
        ("a.csv", b'a,b\n"x" y,2\n', "the row from line 2 on can't be read .* or say `quoting: false`"),
        ("a.csv", b"a,b,a\n1,2,3\n", "line 1 names column 'a' twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is no JSON object"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, says):
    path = made.write(tmp_path, name, content)
    with pytest.raises(UserError, match=says) as raised:
        read(path, format_of(path))
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files_and_unknown_endings(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "a.csv", "csv")
    with pytest.raises(UserError, match=r"a\.xlsx: say its `format`"):
        format_of(tmp_path / "a.xlsx")
