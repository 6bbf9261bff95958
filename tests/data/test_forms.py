"""Forms and encodings in which tables come: read whole, or refused with the place; never cut, joined or guessed at
without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from drawplate.data.chat.template import chat_renderer
from drawplate.data.documents import Corpus, read_documents
from drawplate.errors import DataError
from drawplate.recipe import DataSection, load_recipe

FRENCH = "Le chat dort près de la rivière, où l'oiseau chante."


def read(path, render=None, **options) -> Corpus:
    section = DataSection(files=[str(path)], **options)
    return read_documents(section, section.files, render)


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        read(path, **options)
    return error.value.what


@pytest.mark.parametrize(
    ("data", "place"),
    [
        ('text\nred\n"Green" is what he said\nblue\n', "line 3, column 7: a quote closes its cell"),
        ('text\nred\n"The river\nThe dog\n', "line 3, column 1: a quote opens a cell and none closes it"),
        ('text,label\n"said \\"no\\", and slept.",1\n', "line 2, column 8: a quote closes its cell"),
        ('text,label\n"a ""b"" c",1\n"a\nb",2\nx,"y" z\n', "line 5, column 5: a quote closes its cell"),
        ("text,label,text\na,1,b\n", "the column text is there twice (columns 1 and 3)"),
        ("body,label\na,1\n", "no column text, messages, or prompt with completion (there are: body, label)"),
    ],
)
def test_a_csv_that_cannot_be_read_whole_is_refused_with_the_place(tmp_path, data, place):
    assert place in refusal(write(tmp_path / "a.csv", data))


def test_a_row_of_csv_with_other_cells_than_the_header_costs_that_row_and_is_said(tmp_path):
    corpus = read(write(tmp_path / "a.csv", 'text,label\nThe cat, asleep,1\n"The bird, awake",2\nhalf a line\n\n'))
    assert texts(corpus) == ["The bird, awake"]
    assert corpus.left_out[0].startswith("1 of 3 rows of a.csv is left out, the first is row 2: its line has 3 cells")
    assert corpus.left_out[1].startswith("1 of 3 rows of a.csv is left out, the first is row 4: its line has 1 cells")


def test_a_csv_cell_keeps_its_quotes_line_ends_and_separators(tmp_path):
    corpus = read(write(tmp_path / "a.csv", 'text,label\n"a ""b"", c\nd",1\nthe 5" pipe,2\n'))
    assert texts(corpus) == ['a "b", c\nd', 'the 5" pipe']
    assert corpus.left_out == ()


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_csv_with_another_separator_is_read_and_said(tmp_path, mark, name):
    corpus = read(write(tmp_path / "a.csv", f"text{mark}label\nThe cat, asleep.{mark}1\n"))
    assert texts(corpus) == ["The cat, asleep."]
    assert corpus.left_out == (f"a.csv: its columns are separated by {name}.",)


@pytest.mark.parametrize("ending", ["txt", "csv", "jsonl", "json", "html"])
@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("cp1252", "not UTF-8, read as cp1252 (a guess: Western European"),
        ("utf-16", "read as UTF-16"),
        ("utf-16-le", "read as UTF-16-LE (a guess: it has no mark)"),
        ("utf-32", "read as UTF-32"),
    ],
)
def test_every_text_format_has_the_same_words_in_every_encoding_and_says_the_guess(tmp_path, ending, encoding, said):
    forms = {
        "txt": FRENCH,
        "html": f"<p>{FRENCH}</p>",
        "csv": f'text\n"{FRENCH}"\n',
        "jsonl": json.dumps({"text": FRENCH}, ensure_ascii=False) + "\n",
        "json": json.dumps([{"text": FRENCH}], ensure_ascii=False, indent=1),
    }
    corpus = read(write(tmp_path / f"a.{ending}", forms[ending].encode(encoding)))
    assert texts(corpus) == [FRENCH]
    assert said in corpus.intake[0].reason
    assert any(said in line for line in corpus.left_out)


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_what_is_not_western_is_refused_until_its_encoding_is_named(tmp_path, ending):
    row = json.dumps({"text": "кот спит на доме", "id": "x" * 200}, ensure_ascii=False)
    path = write(tmp_path / f"a.{ending}", row.encode("cp1251"))
    assert "name its encoding in data.encoding" in refusal(path)
    assert "кот спит на доме" in texts(read(path, encoding="cp1251"))[0]


def test_an_encoding_that_does_not_exist_is_an_error_of_the_recipe(tmp_path):
    values = {"model": {"name_or_path": "m"}, "data": {"files": ["a.txt"], "encoding": "klingon"}}
    with pytest.raises(Exception, match="no encoding of text called klingon"):
        load_recipe(values)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", '[{"text": "one"},\n {"text": "two"}]'),
        ("a.jsonl", '[{"text": "one"},\n {"text": "two"}]'),
        ("a.jsonl", '[{"text": "one"}, {"text": "two"}]'),
        ("a.jsonl", '{\n  "text": "one"\n}\n{\n  "text": "two"\n}\n'),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n'),
    ],
)
def test_json_is_read_as_lines_as_an_array_and_over_several_lines(tmp_path, name, data):
    assert texts(read(write(tmp_path / name, data))) == ["one", "two"]


def test_broken_json_over_several_lines_names_the_place(tmp_path):
    path = write(tmp_path / "a.json", '[\n {"text": "one"},\n {"text": two}\n]')
    assert "broken JSON: line 3, column 11" in refusal(path)


def test_a_key_that_is_given_twice_refuses_its_row(tmp_path):
    data = '{"text": "one", "text": "two"}\n{"messages": [{"role": "user", "role": "system"}]}\n{"text": "three"}\n'
    corpus = read(write(tmp_path / "a.jsonl", data))
    assert texts(corpus) == ["three"]
    assert "the key text is given twice" in corpus.intake[0].reason
    assert "the key role is given twice" in corpus.intake[0].reason


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv", "html"])
def test_an_empty_file_is_said(tmp_path, ending):
    write(tmp_path / f"a.{ending}", "")
    assert f"a.{ending}: it is empty" in refusal(tmp_path / f"a.{ending}")
    write(tmp_path / "b.txt", "text")
    assert f"{tmp_path.name}/a.{ending} is left out: it is empty." in read(tmp_path).left_out


def test_parquet_bytes_that_are_no_utf8_cost_their_row(tmp_path):
    raw = pyarrow.array([b"the cat sleeps", b"the d\xf4g runs", b"the bird sings"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    corpus = read(tmp_path / "a.parquet")
    assert texts(corpus) == ["the cat sleeps", "the bird sings"]
    reason = "a column of text holds bytes that are no UTF-8"
    assert corpus.left_out == (f"1 of 3 rows of a.parquet is left out, the first is row 2: {reason}.",)


ASKED = {"role": "user", "content": "a cat?"}
ANSWERED = {"role": "assistant", "content": "it sat"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "completion": "it sat"},
        {"conversations": [{"from": "human", "value": "a cat?"}, {"from": "gpt", "value": "it sat"}]},
        {"instruction": "a cat?", "output": "it sat"},
        {"instruction": "a cat?", "input": "", "output": "it sat"},
    ],
)
def test_conversations_are_read_in_every_form_that_says_who_speaks(tmp_path, tokenizer, row):
    corpus = read(write(tmp_path / "a.jsonl", json.dumps(row)), chat_renderer(tokenizer))
    [document] = corpus.documents
    assert document.text == tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)
    assert [document.text[a:b] for a, b in document.trained_spans] == ["it sat<|im_end|>"]
    assert corpus.left_out == ()


def test_answers_in_a_prompt_of_messages_are_not_learnt(tmp_path, tokenizer):
    row = {"prompt": [ASKED, ANSWERED, ASKED], "completion": [{"role": "assistant", "content": "on a mat"}]}
    [document] = read(write(tmp_path / "a.jsonl", json.dumps(row)), chat_renderer(tokenizer)).documents
    assert [document.text[a:b] for a, b in document.trained_spans] == ["on a mat<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": [{"from": "observation", "value": "x"}]}, "a message from observation"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history"),
        ({"messages": "no JSON"}, "messages is a string and no JSON"),
        ({"messages": [ASKED, ANSWERED], "images": ["x.png"]}, "the row holds images: only text is learnt"),
        ({"messages": [{"role": "system", "content": "a"}, ANSWERED], "system": "b"}, "system beside"),
        ({"question": "a", "answer": "b"}, "there are: question, answer); data.text_field names the column"),
    ],
)
def test_a_row_that_means_more_or_says_less_is_refused_by_name(tmp_path, tokenizer, row, reason):
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(DataError) as error:
        read(path, chat_renderer(tokenizer))
    assert reason in error.value.what


MARKUP = "<|im_start|>user\na cat?<|im_end|>\n<|im_start|>assistant\nit sat<|im_end|>"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_chat_markup_in_a_text_is_said_and_parsed_where_that_is_asked_for(tmp_path, tokenizer, name):
    path = write(tmp_path / name, MARKUP if name == "a.txt" else json.dumps({"text": MARKUP}))
    plain = read(path, chat_renderer(tokenizer))
    assert plain.documents[0].trained_spans is None
    assert "<|im_start|> and what follows it are read as plain text" in plain.left_out[0]
    assert "data.chat_markup" in plain.left_out[0]
    [document] = read(path, chat_renderer(tokenizer), chat_markup="parse").documents
    assert document.text == tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)
    assert [document.text[a:b] for a, b in document.trained_spans] == ["it sat<|im_end|>"]


@pytest.mark.parametrize(
    "text",
    [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na cat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nit sat<|eot_id|>",
        "<bos><start_of_turn>user\na cat?<end_of_turn>\n<start_of_turn>model\nit sat<end_of_turn>\n",
    ],
)
def test_markup_of_other_families_is_parsed_too(tmp_path, tokenizer, text):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": text}))
    [document] = read(path, chat_renderer(tokenizer), chat_markup="parse").documents
    assert document.text == tokenizer.apply_chat_template([ASKED, ANSWERED], tokenize=False)


def test_a_page_about_markup_stays_a_text(tmp_path, tokenizer):
    path = write(tmp_path / "a.txt", "A turn begins with <|im_start|>user and ends with <|im_end|>.")
    assert read(path, chat_renderer(tokenizer)).left_out == ()


def test_links_of_the_hubs_cache_are_read_and_links_that_lead_out_are_not(tmp_path):
    cache = tmp_path / "datasets--a--b"
    snapshot = cache / "snapshots" / "1" / "data"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(cache / "blobs" / "0a1b", '{"text": "the cat"}')
    write(cache / "secret", '{"text": "secret"}')
    write(cache / "other", "other")
    write(snapshot / "more.txt", "the dog")
    (snapshot / "docs.jsonl").symlink_to("../../../blobs/0a1b")
    (snapshot / "again.txt").symlink_to("more.txt")
    (snapshot / "out.jsonl").symlink_to("../../../secret")
    (snapshot / "up.jsonl").symlink_to("../../../blobs/../other")
    for root in (snapshot, snapshot.parent):
        corpus = read(root)
        assert sorted(texts(corpus)) == ["the cat", "the dog"]
        skipped = [line for line in corpus.left_out if "leads out of the folder; name the link itself" in line]
        assert skipped[0].startswith("2 files are left out")
    assert texts(read(snapshot / "out.jsonl")) == ["secret"], "what is named itself is read"
