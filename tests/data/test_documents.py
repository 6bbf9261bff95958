from __future__ import annotations

import csv
import json
import os
import random
import socket
import time

import pyarrow
import pyarrow.parquet
import pytest

from drawplate.data.chat.template import chat_renderer
from drawplate.data.documents import read_documents
from drawplate.data.readers import formats, hub
from drawplate.data.readers.files import printable
from drawplate.errors import DataError, NeedsNetwork, UsageError
from drawplate.recipe import DataSection, cache_folder, expand


def read(path, render=None, **options):
    section = DataSection(files=[str(path)], **options)
    return read_documents(section, section.files, render)


def texts(corpus) -> list[str]:
    return [document.text for document in corpus.documents]


def lines(corpus) -> dict[str, tuple[str, str]]:
    return {line.file: (line.status, line.reason) for line in corpus.intake}


ROWS = [{"text": "first", "id": 1}, {"text": "second", "id": 2}]


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("ending", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document(tmp_path, ending):
    (tmp_path / f"a{ending}").write_text("\n a text\nof two lines \n")
    corpus = read(tmp_path / f"a{ending}")
    assert texts(corpus) == ["a text\nof two lines"]
    assert corpus.documents[0].name == f"a{ending}"
    assert corpus.documents[0].trained_spans is None
    [line] = corpus.intake
    assert (line.status, line.documents, line.characters, line.bytes) == ("read", 1, 19, 23)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_table_has_a_document_a_row(tmp_path, ending):
    corpus = read(write_rows(tmp_path / f"t{ending}", ROWS))
    assert texts(corpus) == ["first", "second"]
    assert [d.name.partition("#")[0] for d in corpus.documents] == [f"t{ending}"] * 2
    assert len({d.name for d in corpus.documents}) == 2


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_another_text_field_can_be_named(tmp_path, ending):
    path = write_rows(tmp_path / f"t{ending}", [{"body": "a"}, {"body": "b"}])
    assert texts(read(path, text_field="body")) == ["a", "b"]
    with pytest.raises(DataError, match="there are: body"):
        read(path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_only_the_completion_is_trained(tmp_path, ending):
    corpus = read(write_rows(tmp_path / f"t{ending}", [{"prompt": "Q: \r\n", "completion": "an answer"}]))
    [document] = corpus.documents
    assert document.text == "Q: \nan answer"
    assert [document.text[a:b] for a, b in document.trained_spans] == ["an answer"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_conversations_are_rendered(tmp_path, ending, tokenizer):
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat\r\non"}]
    path = write_rows(tmp_path / f"t{ending}", [{"messages": talk}])
    [document] = read(path, chat_renderer(tokenizer)).documents
    assert [document.text[a:b] for a, b in document.trained_spans] == ["sat\non<|im_end|>"]
    with pytest.raises(DataError, match="chat template"):
        read(path)


def test_broken_rows_cost_themselves_and_are_counted(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n\n[1]\n{"text": 5}\n{"other": 1}\n' + b"[" * 100_000 + b'\n{"text": "too"}'
    )
    corpus = read(path)
    assert texts(corpus) == ["good", "too"]
    [line] = corpus.intake
    assert (line.status, line.refused_rows) == ("read", 5)
    assert "row 2: not JSON" in line.reason


def test_folders_are_read_in_the_same_order_with_names_from_the_folder(tmp_path):
    root = tmp_path / "reports"
    for name in ("b.txt", "a.txt", "sub/z.txt", "sub/y.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    corpus = read(root)
    names = [d.name for d in corpus.documents]
    assert names == ["reports/a.txt", "reports/b.txt", "reports/sub/y.md", "reports/sub/z.txt"]
    assert read(root) == corpus


def test_files_of_the_same_name_keep_different_names(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    paths = [str(tmp_path / "one" / "a.txt"), str(tmp_path / "two" / "a.txt"), str(tmp_path / "one" / "a.txt")]
    corpus = read_documents(DataSection(files=paths), paths)
    assert len({d.name for d in corpus.documents}) == 2
    assert [line.reason for line in corpus.intake] == ["", "", "named twice"]


def test_exact_duplicates_empty_and_short_documents_are_counted(tmp_path):
    rows = [{"text": t} for t in ("same words", "same  words\n", "", "  \n", "no", "different words")]
    corpus = read(write_rows(tmp_path / "t.jsonl", rows), min_characters=3)
    assert texts(corpus) == ["same words", "different words"]
    [line] = corpus.intake
    assert (line.documents, line.duplicate_documents, line.empty_documents, line.short_documents) == (2, 1, 2, 1)


def test_duplicates_are_found_across_files(tmp_path):
    (tmp_path / "a.txt").write_text("same")
    (tmp_path / "b.md").write_text("same\r\n")
    corpus = read(tmp_path)
    assert [line.duplicate_documents for line in corpus.intake] == [0, 1]
    assert texts(corpus) == ["same"]


def test_split_pattern_starts_a_document_and_leaves_out_what_it_matches(tmp_path):
    (tmp_path / "a.md").write_text("preface\n# One\nfirst\n\n# Two\nsecond\n# Three\n")
    assert texts(read(tmp_path, split_pattern="^# .*")) == ["preface", "first", "second"]
    assert texts(read(tmp_path, split_pattern="^# ")) == ["preface", "One\nfirst", "Two\nsecond", "Three"]
    assert texts(read(tmp_path, split_pattern="^(?=# )"))[1] == "# One\nfirst"
    [line] = read(tmp_path, split_pattern="^# .*").intake
    assert line.empty_documents == 1
    assert "took out 17 characters" in line.reason


def test_split_pattern_cuts_rows_of_text_too(tmp_path):
    path = write_rows(tmp_path / "t.jsonl", [{"text": "= a\none\n= b\ntwo"}, {"text": "three"}])
    corpus = read(path, split_pattern="^= .*")
    assert texts(corpus) == ["one", "two", "three"]
    assert [d.name for d in corpus.documents] == ["t.jsonl#1.1", "t.jsonl#1.2", "t.jsonl#2"]


def test_a_split_pattern_that_is_no_expression_is_a_usage_error(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="split_pattern"):
        read(tmp_path, split_pattern="(")


ARTICLE = "<p>" + "The sea level rises because water expands and ice melts on land. " * 8 + "</p>"


def test_html_gives_the_main_text_and_no_menu_or_script(tmp_path):
    page = (
        f"<html><head><title>t</title></head><body><nav><a href=x>menu</a></nav><article><h1>Sea</h1>{ARTICLE * 3}"
        "</article><script>alert(1)</script></body></html>"
    )
    (tmp_path / "a.html").write_text(page)
    [text] = texts(read(tmp_path))
    assert "sea level rises" in text
    assert "alert" not in text
    assert "menu" not in text


def test_html_that_is_split_keeps_its_headings_as_lines(tmp_path):
    page = "<body>" + "".join(f"<div><p>term: {i}</p><p>About <b>no</b>.&nbsp;{i}<br>more</p></div>" for i in range(3))
    (tmp_path / "a.htm").write_text(page)
    assert texts(read(tmp_path, split_pattern="^term: .*")) == [f"About no. {i}\nmore" for i in range(3)]


def test_html_nested_deeper_than_any_tree_is_read(tmp_path):
    (tmp_path / "a.html").write_text("<div>" * 200_000 + "deep words" + "</div>" * 200_000)
    started = time.monotonic()
    assert texts(read(tmp_path)) == ["deep words"]
    assert time.monotonic() - started < 60


def test_a_page_of_one_long_line_is_read_whole(tmp_path):
    (tmp_path / "a.html").write_text("<p>" + "a" * 11_000_000)
    corpus = read(tmp_path)
    assert len(texts(corpus)[0]) == 11_000_000
    assert "too large" in corpus.intake[0].reason


def test_a_large_page_without_text_is_refused(tmp_path):
    (tmp_path / "a.html").write_text("<script>" + "x" * 2_000_000 + "</script>")
    (tmp_path / "b.txt").write_text("text")
    assert lines(read(tmp_path))[f"{tmp_path.name}/a.html"] == ("refused", "no text was found in 2 MiB of HTML")


def test_external_entities_are_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    page = f'<!DOCTYPE html [<!ENTITY e SYSTEM "file://{secret}">]><body><p>words &e; here</p></body>'
    (tmp_path / "a.html").write_text(page)
    assert "canary" not in texts(read(tmp_path / "a.html"))[0]


@pytest.mark.parametrize(
    ("data", "text", "remark"),
    [
        ("héllo".encode(), "héllo", ""),
        ("héllo".encode("utf-8-sig"), "héllo", ""),
        ("héllo".encode("utf-16"), "héllo", "UTF-16"),
        ("héllo wörld".encode("cp1252"), "héllo wörld", "cp1252"),
        (b"tex\x1b[31mt" + b"x" * 9000 + b"\x00", "tex[31mt" + "x" * 9000, "2 control or broken characters mended"),
    ],
)
def test_encodings_are_recognised_and_repairs_said(tmp_path, data, text, remark):
    (tmp_path / "a.txt").write_bytes(data)
    corpus = read(tmp_path)
    assert texts(corpus) == [text]
    assert remark in corpus.intake[0].reason


def test_html_in_a_declared_encoding_is_read(tmp_path):
    (tmp_path / "a.html").write_bytes('<meta charset="koi8-r"><p>море и лёд</p>'.encode("koi8-r"))
    assert texts(read(tmp_path, split_pattern="^$")) == ["море и лёд"]


def test_broken_unicode_in_rows_is_replaced_and_counted(tmp_path):
    broken = b'{"text": "a\\ud800b"}\n{"text": "\xc3\xa9t\xc3\xa9 c\xffd"}\n'
    (tmp_path / "a.jsonl").write_bytes(broken)
    corpus = read(tmp_path)
    assert texts(corpus) == ["a\ufffdb", "\u00e9t\u00e9 c\ufffdd"]
    assert "2 control or broken" in corpus.intake[0].reason
    assert "read as UTF-8, with 1 characters that were broken as U+FFFD" in corpus.left_out[0]


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\x7fELF\x00\x01", "binary"),
        ("a.txt", "日本語の文章です".encode("shift-jis"), "iconv"),
        ("a.parquet", b"PAR1 not", "parquet"),
        ("a.csv", b"a\x00b", "binary"),
    ],
)
def test_what_is_not_text_is_refused_with_the_reason(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("text")
    status, why = lines(read(tmp_path))[f"{tmp_path.name}/{name}"]
    assert status == "refused"
    assert reason in why


def test_links_pipes_sockets_hidden_and_foreign_files_are_skipped_unopened(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "good.txt").write_text("good")
    (root / "link.txt").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / ".hidden.txt").write_text("hidden")
    (root / ".git").mkdir()
    (root / "image.png").write_bytes(b"x")
    os.mkfifo(root / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket.txt"))
        corpus = read(root)
    assert texts(corpus) == ["good"]
    skipped = {line.file.removeprefix("root/") for line in corpus.intake if line.status == "skipped" and line.reason}
    assert skipped == {"link.txt", "loop", ".hidden.txt", ".git", "image.png", "pipe.txt", "socket.txt"}


def test_a_sparse_terabyte_is_skipped_unopened(tmp_path, monkeypatch):
    with (tmp_path / "a.txt").open("wb") as file:
        try:
            file.truncate(2**40)
        except OSError:
            file.truncate(1000)
            monkeypatch.setattr("drawplate.data.readers.files.MAX_FILE_BYTES", 999)
    (tmp_path / "b.txt").write_text("text")
    assert "split it" in lines(read(tmp_path))[f"{tmp_path.name}/a.txt"][1]


def test_a_parquet_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.parquet", ROWS)
    monkeypatch.setattr(formats, "MAX_TABLE_BYTES", 10)
    with pytest.raises(DataError, match="would decompress to"):
        read(tmp_path)


def test_a_parquet_file_damaged_in_the_middle_leaves_no_half_of_its_rows(tmp_path):
    texts_of_rows = [f"row {i} {random.Random(i).randbytes(100).hex()}" for i in range(4000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts_of_rows}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    start, end = len(data) * 6 // 10, len(data) * 9 // 10
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    assert next(formats.read_parquet(path, ("text",)).rows)[1] == {"text": texts_of_rows[0]}
    (tmp_path / "b.txt").write_text(texts_of_rows[0])
    corpus = read(tmp_path)
    assert texts(corpus) == [texts_of_rows[0]]
    assert [line.status for line in corpus.intake] == ["refused", "read"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "b.txt").write_text("text")
    assert lines(read(tmp_path))[f"{tmp_path.name}/a.txt"] == ("refused", "Permission denied")


def test_names_are_shown_without_control_characters_or_broken_bytes(tmp_path):
    (tmp_path / "a\x1b[2Jb\u202e.txt").write_text("one")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("two")
    names = [d.name for d in read(tmp_path).documents]
    assert names == [f"{tmp_path.name}/a\\x1b[2Jb\\u202e.txt", f"{tmp_path.name}/\\xff.txt"]
    assert all(name == printable(name) for name in names)


@pytest.mark.parametrize("content", [{}, {"a.txt": ""}, {"a.txt": " \n"}, {"a.png": "x"}, {".a.txt": "x"}])
def test_nothing_to_read_is_a_data_error_with_a_next_step(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="no document") as caught:
        read(tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.next_step


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere cannot be read: No such file"):
        read(tmp_path / "nowhere")


def test_home_and_cache_are_filled_in_and_no_other_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET", "value")
    monkeypatch.delenv("DRAWPLATE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "drawplate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "drawplate"
    monkeypatch.setenv("DRAWPLATE_CACHE", "~/here")
    assert expand("${DRAWPLATE_CACHE}/demo") == tmp_path / "here" / "demo"
    assert expand("~/x${SECRET}") == tmp_path / "x${SECRET}"
    (tmp_path / "a.txt").write_text("found")
    assert texts(read("~/a.txt")) == ["found"]


def test_a_dataset_without_network_says_so_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    started = time.monotonic()
    with pytest.raises(NeedsNetwork, match="nobody/nothing") as caught:
        read_documents(DataSection(dataset="nobody/nothing"), [])
    assert time.monotonic() - started < 5
    assert caught.value.exit_code == 9
    assert "load_dataset('nobody/nothing', split='train')" in caught.value.next_step


def test_the_hubs_offline_switch_is_thrown_only_while_a_dataset_is_looked_for(monkeypatch):
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for reachable in (True, False):
        monkeypatch.setattr(hub, "_reachable", lambda endpoint, answer=reachable: answer)
        with hub._offline_if_unreachable():
            assert constants.HF_HUB_OFFLINE == datasets.config.HF_HUB_OFFLINE == (not reachable)
        assert not constants.HF_HUB_OFFLINE
        assert not datasets.config.HF_HUB_OFFLINE


def test_a_datasets_rows_become_documents(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([*ROWS, {"text": None, "id": 3}])
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows if split == "train" else None)
    corpus = read_documents(DataSection(dataset="some/set"), [])
    assert [(d.name, d.text) for d in corpus.documents] == [("some/set#1", "first"), ("some/set#2", "second")]
    assert corpus.intake[0].refused_rows == 1


def test_a_host_that_refuses_is_unreachable_and_a_proxy_is_trusted(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert not hub._reachable(endpoint)
        unused.listen()
        assert hub._reachable(endpoint)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub._reachable(endpoint)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_rows_are_grouped_by_a_column_and_those_without_it_are_said(tmp_path, ending):
    rows = [{"text": "one", "book": "a"}, {"text": "two", "book": "b"}, {"text": "three", "book": None}]
    corpus = read(write_rows(tmp_path / f"rows{ending}", rows), group_by="book")
    assert [document.group for document in corpus.documents] == ["a", "b", ""]
    assert "1 row without book: each is a group of its own" in corpus.intake[0].reason


def test_documents_are_grouped_by_folder_or_file(tmp_path):
    for name in ("a/one.txt", "a/two.txt", "b/three.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n# more of {name}")
    by_folder = [document.group for document in read(tmp_path, group_by="folder").documents]
    assert by_folder == [f"{tmp_path.name}/a", f"{tmp_path.name}/a", f"{tmp_path.name}/b"]
    by_file = read(tmp_path, group_by="file", split_pattern="^# ").documents
    assert len(by_file) == 6
    assert {document.group for document in by_file} == {
        f"{tmp_path.name}/{n}" for n in ("a/one.txt", "a/two.txt", "b/three.txt")
    }
    assert {document.group for document in read(tmp_path).documents} == {""}


@pytest.mark.parametrize(("asked", "found"), [("brief", ["short"]), (None, None), ("third", None)])
def test_a_configuration_of_a_dataset_is_named_or_the_list_is_given(tmp_path, monkeypatch, asked, found):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: True)
    two = tmp_path / "two"
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("long", "brief")]
    for name, text in (("long", "a long text"), ("brief", "short")):
        write_rows(two.parent / f"{name}.jsonl", [{"text": text}])
    two.mkdir()
    for name in ("long", "brief"):
        (two.parent / f"{name}.jsonl").rename(two / f"{name}.jsonl")
    (two / "README.md").write_text("---\nconfigs: " + json.dumps(configs) + "\n---\n")
    section = DataSection(dataset=str(two), dataset_config=asked)
    if found:
        assert texts(read_documents(section, [])) == found
        return
    with pytest.raises(DataError, match="'long', 'brief'") as caught:
        read_documents(section, [])
    assert "data.dataset_config" in caught.value.next_step


def test_a_path_that_cannot_be_and_several_in_one_are_refused_in_words():
    with pytest.raises(DataError, match="File name too long"):
        read("a" * 300)
    with pytest.raises(DataError) as error:
        read("docs,2024")
    assert "data.files=[FIRST, SECOND]" in error.value.next_step
