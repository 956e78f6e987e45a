"""Made files with the traps of the real ones, and where the real ones are."""

from __future__ import annotations

import json
import os
from pathlib import Path

NEMO = (
    ";Caption;URL;type;mean_sscd;max_sscd;Index\r\n"
    "0;The No Limits, or None;https://a.example/1.jpg;VM;0.83;0.84;0030727993\r\n"
    '1;"""Watch: <i>Lifted Up</i>, """"1985""""""";"https://a.example/2;3.jpg";TM;;;12\r\n'
    "2;nan;https://a.example/4.jpg;VM;0.9;0.95;7\r\n"
    "3;Null;https://a.example/5.jpg;TM;0.1;0.2;8"
)
REWRITE = (
    ";Caption;URL;type;mean_sscd;max_sscd;Index\n"
    '2;"Not a number" by nobody, 3" wide;u;VM;;;7\n'
    "0;There are limits;u;VM;;;0030727993\n"
    "3;Null;u;TM;;;8\n"
)
COCO = (
    "image_id,source,prompt,evaluation_seed\r\n"
    '000000000139,coco,"A bicycle,\r\na clock; a | and ""one""",41337\r\n'
    '000000000285,coco,"A bicycle,\r\na clock; a | and ""one""",41338\r\n'
    "000000000632,coco,A dog.\x0b\x1c still one line,1\r\n"
    "000000000724,coco,A dog.\x0b\x1c still one line,1\r\n"
    + "".join(f"{1000 + i:012d},coco,caption {i},{i}\r\n" for i in range(40))
)
DC = (
    "page_id,name,urlslug,ID,ALIGN,EYE,HAIR,SEX,GSM,ALIVE,APPEARANCES,FIRST APPEARANCE,YEAR\n"
    '1422,Batman (Bruce Wayne),\\/wiki\\/Batman,Secret Identity,,,,,,,3093,"1939, May",1939\n'
    "9,Tef\\u00e9 Holland (New Earth),\\/wiki,,,,,,,,97,,\n"
    "403631,GenderTest,\\/wiki,,,,,,,,999,,\n"
    "11,Mercury (Roman God) (New Earth),\\/wiki,,,,,,,,,,\n"
)
MARVEL = (
    "page_id,name,urlslug,ID,ALIGN,EYE,HAIR,SEX,GSM,ALIVE,APPEARANCES,FIRST APPEARANCE,Year\n"
    '64786,"Wolverine (James \\""Logan\\"" Howlett)",\\/W,,,,,,,,3061,Oct-74,1974\n'
    "3,Batman (Earth-616),\\/B,,,,,,,,2,,\n"
    "1422,AC\\/DC (Earth-616),\\/A,,,,,,,,1,,\n"
)
MOVIES = (
    "Poster_Link,Series_Title,Released_Year,Certificate,Runtime,Genre,IMDB_Rating,Overview,Meta_score,Director,"
    "Star1,Star2,Star3,Star4,No_of_Votes,Gross\n"
    'p,The Godfather,1972,A,175 min,"Crime, Drama",9.2,"Says ""no"".",100,F. C.,a,b,c,d,1620367,"134,966,411"\n'
    "p,Apollo 13,PG,U,140 min,Drama,7.6,x,77,R. H.,a,b,c,d,269197,\n"
    "p,Drishyam,2013,U,160 min,Drama,8.3,x,,J. J.,a,b,c,d,1,\n"
    "p,Drishyam,2015,UA,163 min,Drama,8.2,x,,N. K.,a,b,c,d,1,\n"
)
FLICKR = (
    "image_name| comment_number| comment\n"
    '1.jpg| 0| "Two" men; one, with a bar .\n'
    "1.jpg| 1| Two men outside .\n"
    "2.jpg| 0| A dog runs .\n"
    "2.jpg| 4   A dog runs across the grass .\n"
)
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tBiology-inspired concepts\n"
    '"Hello, world" in neon\tIllustrations\tWriting & Symbols\t\n'
)
I2P = (
    ",prompt,categories,hard,inappropriate_percentage,nudity_percentage,evaluation_seed,evaluation_guidance,"
    "sd_image_width,sd_image_height,case_number\n"
    '0,"a, b",sexual,0,50.0,50.0,11,7,512,512,0\n'
    '1,"a, b",sexual,0,50.0,40.0,12,7,512,512,1\n'
    "2,,hate,0,0.0,0.0,13,7,512,512,2\n"
    '3,c,"illegal activity, hate",1,0.0,0.0,14,7.5,512,768,3\n'
    "4,c,hate,1,0.0,0.0,14,7.5,512,768,4\n"
)
WEN = [
    {"caption": "The No Limits", "index": 1030727993, "url": "u"},
    {"caption": "None", "index": 12, "url": "u"},
]
WEBSTER = [
    {
        "caption": f"caption {label}",
        "url": "u",
        "overfit_type": label,
        "gen_seeds": [1, 2],
        "mse_real_gen": 0.5,
    }
    for label in ("MV", "RV", "TV", "N")
]
REPHRASED = [
    {
        "caption": "The No Limits",
        "index": 1030727993,
        "url": "u",
        "caption1": "No limits",
        "caption2": "Limitless",
    }
]
LINES = 'A\x0bB\x1d and \x00C\r\nNone\r\n"Watch", the \u2028 end'


def write(folder: Path, name: str, content: object) -> Path:
    """Write a text, bytes, or the rows of a .jsonl or .parquet file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        path.write_bytes("\n".join(json.dumps(row) for row in content).encode())
    return path


def real_folder() -> Path | None:
    """The folder with the real files: LETHE_DATA, else shared/data beside the repository; None: nowhere."""
    named = os.environ.get("LETHE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return folder if folder.is_dir() else None
