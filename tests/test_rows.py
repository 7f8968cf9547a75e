"""Damaged rows are named and counted, never text; other forms of JSON and of chats are read or refused with advice."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxllm.config import TrainConfig
from jaxllm.data import delimited, file_source
from jaxllm.data.file_source import FileSource
from jaxllm.data.sources import open_source
from jaxllm.errors import UserError
from tests.configs import open_files


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(file_source, "WAIT", 0.0)


def texts(folder: Path, name: str, content: str | bytes, **options) -> tuple[list, FileSource]:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    source = open_source(TrainConfig.from_options(data=str(folder / name), **options).data, 0)
    return [chunk.text for chunk in source.chunks()], source


def table(rows: dict[int, str], count: int, form: str) -> str:
    """`count` rows after a header, those of `rows` as they are given."""
    header = {"\t": "id\ttext", ",": "id,text,label"}[form[3]]
    return "\n".join([header, *(rows.get(i, form.format(i)) for i in range(count))]) + "\n"


QUOTES = [
    {7: '7\t"some words'},
    {7: '7\t"some words', 300: '300\tmore" words'},
    {7: '7\t"some words', 300: '300\tmore words"'},
    {i: f'{i}\t"' for i in range(0, 900, 2)},
    {7: '7\t"quoted"', 8: '8\t""', 9: '9\t"a ""b"" c"'},
]


@pytest.mark.parametrize("odd", QUOTES)
def test_tsv_has_no_quoting(odd, tmp_path):
    content = table(odd, 1000, "{0}\tsome words {0}")
    found, source = texts(tmp_path, "a.tsv", content)
    assert found == [line.split("\t")[1] for line in content.splitlines()[1:]]
    assert source.position["skipped"] == 0


def test_tsv_rows_with_another_number_of_fields_are_damaged(tmp_path, capsys):
    content = table({3: "3\tcut", 5: "5", 6: "6\ta\tb", 7: "7\tspare\t"}, 50, "{0}\tsome words")
    found, source = texts(tmp_path, "a.tsv", content)
    assert (len(found), source.position["skipped"]) == (48, 2)
    assert "a.tsv: rows with damage are skipped and counted" in capsys.readouterr().out


DAMAGE = {
    "unclosed": ({7: '7,"some words,x'}, {7}),
    "two stray quotes, the second within a field": ({7: '7,"some words,x', 90: '90,more" words,x'}, {7}),
    "two that open": ({7: '7,"some words,x', 8: '8,"some words,x'}, {7, 8}),
    "in the last row": ({999: '999,"some words,x'}, {999}),
    "text after a quoted field": ({7: '7,"some" words,x'}, {7}),
    "fields too few and too many": ({7: "7,some words", 8: "8,a,b,c"}, {7, 8}),
    "hundreds of lines": ({7: '7,"' + "line, of\n" * 500 + '",x'}, {7}),
    "thousands of lines without delimiters": ({7: '7,"' + "line\n" * 5000 + '",x'}, {7}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_csv_rows_are_dropped_alone(damage, tmp_path, capsys):
    odd, lost = DAMAGE[damage]
    content = table(odd, 1000, "{0},some words {0},x")
    found, source = texts(tmp_path, "a.csv", content)
    kept = [i for i in range(1000) if i not in lost]
    assert found == [odd[i].split(",")[1] if i in odd else f"some words {i}" for i in kept]
    assert source.position["skipped"] == (1 if damage == "two that open" else len(lost))
    assert "a.csv: rows with damage are skipped" in capsys.readouterr().out
    positions = []
    again = open_files(tmp_path / "a.csv")
    for _ in again.chunks():
        positions.append(again.position)
    for at in (0, 5, 6, 7, 8, 500, len(found) - 2):  # it continues after any row
        resumed = open_files(tmp_path / "a.csv")
        resumed.position = json.loads(json.dumps(positions[at]))
        assert [chunk.text for chunk in resumed.chunks()] == found[at + 1 :]


def test_good_csv_is_not_taken_for_damage(tmp_path, capsys):
    rows = ["a\n" * 100 + "b", 'she said ""hi"", and\n""no""', '5\' 10"" tall', "a, b\nc, d\ne, f", ",", "\r\n"]
    content = "id,text\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)) + "9,plain\n"
    found, source = texts(tmp_path, "a.csv", content)
    assert found == [row.replace('""', '"') for row in rows] + ["plain"]
    assert source.position["skipped"] == 0
    assert capsys.readouterr().out == ""


POEM = "\n".join(f"Line {i}, with a comma" for i in range(8))
CLOSED = {
    "a poem": ("title", POEM),
    "code": ("label", "\n".join(f"foo({i}, {i})" for i in range(30))),
    "lines that may be rows": ("label", "open,1\n" + "".join(f"r{i},{i}\n" for i in range(4)) + "close"),
    "one column": ("", "line\n" * 150),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_csv_field_that_closes_is_one_text(case, tmp_path):
    other, text = CLOSED[case]
    head, end = (f"{other},text", "x,") if other else ("text", "")
    found, source = texts(tmp_path, "a.csv", f'{head}\n{end}before\n{end}"{text}"\n{end}after\n')
    assert (found, source.position["skipped"]) == (["before", text, "after"], 0)


@pytest.mark.parametrize("line", ["line", "foo(1, 1)"])
@pytest.mark.parametrize("other", ["", "x,"])
def test_a_csv_field_of_hundreds_of_lines_is_one_skipped_row(line, other, tmp_path, capsys):
    content = f'{"label," if other else ""}text\n{other}before\n{other}"' + f"{line}\n" * 250 + f'"\n{other}after\n'
    found, source = texts(tmp_path, "a.csv", content)
    assert (found, source.position["skipped"]) == (["before", "after"], 1)
    assert "a field of more than 200 lines" in capsys.readouterr().out


OVER_LINES = {
    'text\tlabel\n"line1\nline2"\t1\nx\t2\n': (["line1\nline2", "x"], 0),
    'id\ttext\n1\t"line1\nline2"\n': (["line1\nline2"], 0),
    'id\ttext\n1\tx\n2\t"line1\n\n""line3"""\n3\ty\n': (["x", 'line1\n\n"line3"', "y"], 0),
    'text\n"line1\nline2"\nx\n': (["x"], 1),
    'id\ttext\n1\tx\n2\t"' + "line\n" * 300 + '"\n3\ty\n': (["x", "y"], 301),
    'id\ttext\n1\tx\n2\t"line1\nline2\n': (["x"], 2),
    'text\nx\n"line1\nline2\n': (["x", '"line1', "line2"], 0),
    "id\ttext\n" + "0\tx\n" * 30000 + '1\t"line1\nline2"\n': (["x"] * 30000 + ["line1\nline2"], 0),
    'id\ttext\n1\t"a\n2\tb\n3\n4\tc\n5\td"\n': (['"a', "b", "c", 'd"'], 1),
}


@pytest.mark.parametrize("content", OVER_LINES, ids=lambda content: repr(content[:30]))
def test_no_part_of_a_tsv_field_over_lines_is_a_text(content, tmp_path):
    found, source = texts(tmp_path, "a.tsv", content)
    assert (found, source.position["skipped"]) == OVER_LINES[content]


def test_a_csv_line_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "MAX_ROW_BYTES", 1000)
    found, source = texts(tmp_path, "a.csv", "id,text\n1,a\n2," + "x" * 5000 + "\n3,b\n")
    assert (found, source.position["skipped"]) == (["a", "b"], 1)


def test_a_run_of_before_reads_csv_as_it_did(tmp_path):
    found, _ = texts(tmp_path, "a.tsv", '1\t2\nid\ttext\n1\t"a\n2\tb"\n'.partition("\n")[2], hold_out="count")
    assert found == ["a\n2\tb"]


def test_a_header_with_the_field_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.csv.*header has the field 'text' twice"):
        texts(tmp_path, "a.csv", "text,text\na,b\n")


OBJECTS = [{"text": f"text {i}\n", "meta": {"n": [i]}} for i in range(40)]
FORMS = {
    "array": json.dumps(OBJECTS),
    "array over lines": json.dumps(OBJECTS, indent=1),
    "array of a row a line": "[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]",
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in OBJECTS),
    "objects over lines, the first a long one": json.dumps({"x": ["y" * 99] * 999, **OBJECTS[0]}, indent=1)
    + "".join(json.dumps(row, indent=2) for row in OBJECTS[1:]),
    "lines": "\n".join(map(json.dumps, OBJECTS)),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.jsonl.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_json_in_any_form_is_read_and_continued(form, name, tmp_path):
    content = FORMS[form].encode()
    found, _ = texts(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    assert found == [row["text"] for row in OBJECTS]
    source = open_files(tmp_path / name)
    chunks = source.chunks()
    for _ in range(13):
        next(chunks)
    resumed = open_files(tmp_path / name)
    resumed.position = json.loads(json.dumps(source.position))
    assert [chunk.text for chunk in resumed.chunks()] == found[13:]


def test_lines_that_are_not_one_object_are_damaged(tmp_path, capsys):
    odd = ['{"text": "a", "text": "b"}', '{"text": "a"}{"text": "b"}', '{"text": "a"} x', '{"text": "cut', "[1]"]
    odd.append('{"messages": [{"role": "user", "content": "a", "content": "b"}]}')
    good = ['{"text": "good", "x": NaN}', ' {"text": "better"} ']
    found, source = texts(tmp_path, "a.jsonl", "\n".join([good[0], *odd, good[1]]))
    assert (found, source.position["skipped"]) == (["good", "better"], len(odd))
    assert capsys.readouterr().out.count("a.jsonl: rows with damage") == 1


CAUSES = {
    '{"text": "cut': "a line that is cut off",
    '{"text": "cut",': "a line that is cut off",
    '{"text": "a"}{"text": "b"}': "several values on one line",
    '{"text": "a"} x': "text after the object on a line",
    '{"text": "a", "text": "b"}': "an object with a key that occurs twice",
    "[1]": "a value that is not a JSON object",
    "{'text': 'a'}": "a line that is not JSON: Expecting property name",
}


@pytest.mark.parametrize("line", CAUSES)
def test_damage_in_json_has_its_cause(line, tmp_path, capsys):
    texts(tmp_path, "a.jsonl", '{"text": "good"}\n' + line)
    assert CAUSES[line] in capsys.readouterr().out


def test_a_row_of_a_chat_alone_is_a_row(tmp_path):
    chat = json.dumps({"dialog": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    with pytest.raises(UserError, match="no field 'text', but dialog: pass --text-field"):
        texts(tmp_path, "a.jsonl", chat)
    with pytest.raises(UserError, match="its field 'messages' holds no chat"):
        texts(tmp_path, "b.jsonl", json.dumps({"messages": [{"role": "user", "value": "Q"}]}))


REFUSED = {
    "columns of pandas": ({"text": {"0": "a", "1": "b"}}, r"'text' is a column of 2 rows.*orient=\"records\""),
    "rows of pandas": ({"0": {"text": "a"}, "1": {"text": "b"}}, r"fields 0, 1 and so on are rows, 2 in all.*records"),
    "columns": ({"text": ["a", "b"], "id": [1, 2]}, "field 'text' is a column of 2 texts"),
    "a wrapper": ({"version": 1, "data": [{"text": "a"}]}, "field 'data' holds 1 rows"),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", REFUSED)
def test_a_single_object_that_holds_all_rows_is_named(form, indent, tmp_path):
    value, said = REFUSED[form]
    with pytest.raises(UserError, match=said):
        texts(tmp_path, "a.json", json.dumps(value, indent=indent))


@pytest.mark.parametrize("end", ["] more", ",]", "", " {}]"])
def test_a_damaged_array_is_refused(end, tmp_path):
    with pytest.raises(UserError, match=r"a\.json"):
        texts(tmp_path, "a.json", '[{"text": "a"}' + end)


LINES = "".join(json.dumps({"text": f"row {i} " * 30}) + "\n" for i in range(2000)).encode()
COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
COMPRESS["zst"] = lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("codec", COMPRESS)
def test_compressed_files_are_read_to_their_end_or_named(codec, tmp_path):
    compress, half = COMPRESS[codec], LINES.index(b"row 1000 ") - 10
    whole = compress(LINES)
    (tmp_path / "good.jsonl").write_bytes(LINES[:100_000].rpartition(b"\n")[0])
    for content, named in (
        (compress(LINES[:half]) + compress(LINES[half:]), False),  # members one after another
        (whole[:-5], True),
        (whole[: len(whole) // 2], True),
        (compress(LINES[:half]) + compress(LINES[half:])[:-5], True),
    ):
        (tmp_path / f"a.jsonl.{codec}").write_bytes(content)
        source = open_files(tmp_path)
        rows = {chunk.text for chunk in source.chunks()}
        assert rows <= {f"row {i} " * 30 for i in range(2000)}
        assert (f"a.jsonl.{codec}" in source.left_out) == named
        assert named or len(rows) == 2000


@pytest.mark.parametrize("legacy", [False, True])
def test_an_arrow_stream_that_is_cut_between_batches_is_named(legacy, tmp_path, capsys):
    column, out = pyarrow.table({"text": [f"words {i}" for i in range(40)]}), pyarrow.BufferOutputStream()
    options = pyarrow.ipc.IpcWriteOptions(use_legacy_format=legacy)
    ends = []
    with pyarrow.ipc.new_stream(out, column.schema, options=options) as writer:
        for batch in column.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(out.tell())
    whole = out.getvalue().to_pybytes()
    found, source = texts(tmp_path, "a.arrow", whole)
    assert (len(found), source.position["skipped"], capsys.readouterr().out) == (40, 0, "")
    found, source = texts(tmp_path, "cut.arrow", whole[: ends[1]])
    assert (len(found), source.position["skipped"]) == (20, 1)
    assert "cut.arrow" in (said := capsys.readouterr().out)
    assert "the stream has no end marker" in said
    assert texts(tmp_path, "cut.arrow", whole[: ends[1]], hold_out="count")[1].position["skipped"] == 0


def chat(*messages: dict, field: str = "messages") -> str:
    return json.dumps({field: list(messages)})


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Q"}, "!"]}
PICTURE = {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "Q"}]}
SHAREGPT = ({"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"})
CHATS = {
    chat(USER, ASSISTANT): [USER, ASSISTANT],
    chat(PARTS, ASSISTANT): [{"role": "user", "content": "Q!"}, ASSISTANT],
    chat(*SHAREGPT, field="conversations"): [USER, ASSISTANT],
    chat({"from": "system", "value": "S"}, *SHAREGPT): [{"role": "system", "content": "S"}, USER, ASSISTANT],
    chat(PICTURE, ASSISTANT): None,
    chat({"role": "user", "value": "Q"}, ASSISTANT): None,
    chat({"role": "user", "content": 5}, ASSISTANT): None,
    chat({"role": "user", "content": None}, ASSISTANT): None,
    chat({"from": "somebody", "value": "Q"}): None,
    chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}): [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
    ],
    '{"messages": []}': None,
}


def test_chats_in_other_forms_are_read_or_skipped(tmp_path):
    found, source = texts(tmp_path, "a.jsonl", "\n".join(CHATS))
    assert found == [wanted for wanted in CHATS.values() if wanted is not None]
    assert source.position["skipped"] == list(CHATS.values()).count(None)


@pytest.mark.parametrize("messages", [[USER, ASSISTANT], list(SHAREGPT)])
def test_a_chat_as_a_text_in_json_is_a_chat(messages, tmp_path):
    text = json.dumps(messages)
    found, _ = texts(tmp_path, "a.jsonl", json.dumps({"messages": text}))
    assert found == [[USER, ASSISTANT]]
    quoted = text.replace('"', '""')
    rows = f'messages\n"{quoted}"\n"{quoted[:-5]}"\n"[{{\'role\': \'user\'}}]"\n'
    found, source = texts(tmp_path, "a.csv", rows)
    assert (found, source.position["skipped"]) == ([[USER, ASSISTANT]], 2)
    assert texts(tmp_path, "b.jsonl", json.dumps({"dialog": text}), text_field="dialog")[0] == [[USER, ASSISTANT]]
    assert texts(tmp_path, "c.jsonl", json.dumps({"text": text}))[0] == [text]
    assert texts(tmp_path, "a.jsonl", json.dumps({"messages": text}), hold_out="count")[0] == [text]
    assert texts(tmp_path, "e.jsonl", json.dumps({"messages": "[no chat"}), hold_out="count")[0] == ["[no chat"]
    with pytest.raises(UserError, match="its field 'messages' holds no chat: write a list"):
        texts(tmp_path, "d.jsonl", json.dumps({"messages": str(messages)}))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_the_side_that_is_not_trained_on_is_named(name, tmp_path):
    column, out = pyarrow.table({"input": ["Q"], "output": ["A"]}), pyarrow.BufferOutputStream()
    if name == "a.parquet":
        pyarrow.parquet.write_table(column, out)
    elif name == "a.arrow":
        with pyarrow.ipc.new_stream(out, column.schema) as writer:
            writer.write_table(column)
    else:
        out.write(b"input,output\nQ,A\n" if name == "a.csv" else b'{"input": "Q", "output": "A"}')
    found, source = texts(tmp_path, name, out.getvalue().to_pybytes(), text_field="output")
    assert found == ["A"]
    assert source.notes == ["input, since only the field 'output' of questions and answers is trained on"]


FIELDS = [
    ("question", "answer"), ("input", "output"),
    ("query", "response"), ("inputs", "targets"), ("question", "answers"), ("problem", "solution"),
    ("id", "user", "assistant"),
    ("instruction", "response"), ("prompt", "answer"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"),
    ("Question", "Answer"),
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS)
def test_questions_and_answers_in_fields_get_advice_that_keeps_both(fields, tmp_path):
    with pytest.raises(UserError, match=r"questions and answers in .*write each row as a chat") as refused:
        texts(tmp_path, "a.jsonl", json.dumps(dict.fromkeys(fields, "words")) + "\n")
    assert "--text-field" not in str(refused.value)
