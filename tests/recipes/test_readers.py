"""Files of records: what their values become, and the one line that names a bad file or record."""

import json
import os
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from samebit.recipes.data.reward_config import RewardConfig
from samebit.recipes.data.reward_pool import load_reward
from samebit.recipes.data.tasks.base import DataConfig
from samebit.recipes.data.tasks.registry import load_datasets


def problems(path, **settings):
    train, _ = load_datasets(DataConfig(path=str(path), eval_size=0, **settings))
    return list(train)


def written(path, *values):
    """A .jsonl file with these JSON texts as labels."""
    lines = [f'{{"prompt": "q{i}", "label": {value}}}\n' for i, value in enumerate(values)]
    path.write_text("".join(lines))
    return path


NUMBERS = {
    "0.00001": "0.00001",
    "1e-5": "0.00001",
    "-1.50E+2": "-150",
    "1.0": "1.0",
    "0.10": "0.10",
    "1e22": "10000000000000000000000",
    "-0.0": "-0.0",
    "7": "7",
    "123456789012345678901234567890": "123456789012345678901234567890",
    "3.14159265358979323846264338": "3.14159265358979323846264338",
    '"1e-05"': "1e-05",
}


def test_numbers_of_json_keep_their_decimal_text(tmp_path):
    found = problems(written(tmp_path / "a.jsonl", *NUMBERS))
    assert [p.label for p in found] == list(NUMBERS.values())
    reward = load_reward(RewardConfig(name="number_match"))
    assert reward("5", found[0]) == 0.0
    assert reward("so 0.00001", found[0]) == reward("1e-5", found[0]) == 1.0


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1e-5, 1.0, 1e22], pyarrow.float64(), ["0.00001", "1.0", "10000000000000000000000"]),
        ([1e-5, 0.1], pyarrow.float32(), ["0.00001", "0.1"]),
        ([0.1], pyarrow.float16(), ["0.1"]),
        ([Decimal("0.00001")], pyarrow.decimal128(9, 5), ["0.00001"]),
        ([2**62], pyarrow.int64(), [str(2**62)]),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_numbers_of_parquet_are_written_out(tmp_path, values, dtype, expected, nested):
    labels = pyarrow.array(values, dtype)
    key = "label"
    if nested:
        labels, key = pyarrow.StructArray.from_arrays([labels], ["answer"]), "label.answer"
    table = pyarrow.table({"prompt": ["q"] * len(values), "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [p.label for p in problems(tmp_path / "a.parquet", label_key=key)] == expected


def test_metadata_and_places(tmp_path):
    """Numbers that are no label are Python's, as a reward expects them."""
    path = tmp_path / "a.jsonl"
    record = {"prompt": "q", "label": 1, "more": {"scale": 0.5, "list": [1e-5, 2, float("nan")]}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode() + b"\r\n\n")
    [problem] = problems(path, metadata_keys=["more"])
    assert repr(problem.metadata) == "{'more': {'scale': 0.5, 'list': [1e-05, 2, nan]}}"
    assert type(problem.metadata["more"]["scale"]) is float
    assert problem.where == f"{path}, line 1"


BAD_LINES = {
    '{"prompt": "q", "label": NaN}': "line 2: 'label' is nan; give a text or a number",
    '{"prompt": "q", "label": -Infinity}': "line 2: 'label' is -inf; give a text or a number",
    '{"prompt": "q", "label": 1e99999}': "line 2: 'label' is .*; give a text or a number",
    '{"prompt": "q", "label": 1e99999999999999999999}': "line 2 is not JSON: the number .* range",
    '{"prompt": "q", "label": true}': "line 2: 'label' is True; give a text or a number",
    '{"prompt": "q", "label": "a", "label": "b"}': "line 2 is not JSON: it has the key 'label' twi",
    '{"prompt": "\\ud800", "label": "a"}': r"line 2 holds the lone surrogate \\ud800",
    '{"prompt": "q", "label": "\\udfffx"}': r"line 2 holds the lone surrogate \\udfff",
    '{"prompt": [{"role": "user", "content": "\\ud800"}], "label": "a"}': "lone surrogate",
    '{"prompt": "", "label": "a"}': "line 2: 'prompt' is ''; give a text",
    '{"prompt": "q", "label": ' + "9" * 5000 + "}": r"the number 9{20}\.\.\. has 5000 digits$",
    "1.5": "line 2 is a JSON number; give an object",
    "[" * 100_000: "line 2 is not JSON: ",
    '{"prompt": "\xff", "label": "a"}': "line 2 is not UTF-8: invalid start byte at byte 12",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:50])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    good = b'{"prompt": "q", "label": "a"}\n'
    path.write_bytes(good + line.encode("latin-1") + b"\n" + good)
    with pytest.raises(ValueError, match=BAD_LINES[line]) as caught:
        problems(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_surrogate_pair_is_a_character(tmp_path):
    [problem] = problems(written(tmp_path / "a.jsonl", '"\\ud83d\\ude00 \\u0000"'))
    assert problem.label == "\U0001f600 \0"


def test_bad_records_are_counted_and_the_first_are_listed(tmp_path):
    path = written(tmp_path / "a.jsonl", *["1", "null"] * 8)
    with pytest.raises(ValueError, match="^8 records cannot be used: ") as caught:
        problems(path)
    assert [f"line {i}:" in str(caught.value) for i in (2, 4, 10, 12)] == [True, True, True, False]
    assert str(caught.value).endswith("; and 3 more")


def damaged(path, how):
    rows = [{"prompt": f"question {i} " * 50, "label": f"{i}"} for i in range(400)]
    table = pyarrow.Table.from_pylist(rows)
    options = {"row_group_size": 200, "use_dictionary": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, path, **options)
    data = bytearray(path.read_bytes())
    if how == "page":
        chunk = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
        middle = chunk.data_page_offset + chunk.total_compressed_size // 2
        data[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(
        {"page": data, "cut": data[: len(data) // 2], "text": b"hi" * 9, "no": b""}[how]
    )


@pytest.mark.parametrize("how", ["page", "cut", "text", "no"])
def test_a_damaged_parquet_file_is_named(tmp_path, how):
    path = tmp_path / "a.parquet"
    damaged(path, how)
    part = ", row group 1" if how == "page" else ""
    with pytest.raises(
        ValueError, match=f"^{path}{part} is not a readable parquet file: ."
    ) as caught:
        problems(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_or_an_unreadable_file_is_named(tmp_path, suffix):
    folder = tmp_path / f"folder.{suffix}"
    folder.mkdir()
    with pytest.raises(OSError, match=f"{folder} is an empty folder; give a .jsonl, .parquet or"):
        problems(folder)
    locked = tmp_path / f"locked.{suffix}"
    locked.write_text("")
    locked.chmod(0)
    if os.access(locked, os.R_OK):
        pytest.skip("root reads everything")
    with pytest.raises((OSError, ValueError), match=f"{locked}"):
        problems(locked)
