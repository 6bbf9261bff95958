"""General text, and samples of whole documents."""

from __future__ import annotations

import pytest

from drawplate.data.documents import read_documents
from drawplate.data.general import general_corpus, general_documents, sample
from drawplate.data.tokens import tokenize
from drawplate.errors import DataError
from drawplate.recipe import DataSection
from tests.tiny import write_texts


def test_the_shipped_prose_is_many_short_documents_of_plain_english():
    documents = general_documents([], "text", None)
    assert len(documents) == 120
    assert all(550 <= len(d.text) <= 1010 and d.text.isascii() for d in documents)
    assert sum(" the " in d.text for d in documents) > 100


def test_files_of_ones_own_take_its_place(tmp_path):
    write_texts(tmp_path / "own", 5)
    assert len(general_documents([str(tmp_path / "own")], "text", None)) == 5
    with pytest.raises(DataError):
        general_documents([str(tmp_path / "absent")], "text", None)


def test_a_sample_is_of_whole_documents_and_depends_on_their_content_alone(tokenizer, tmp_path):
    folder = str(write_texts(tmp_path / "texts", 40))
    documents = read_documents(DataSection(files=[folder]), [folder]).documents
    sequences = tokenize(documents, tokenizer, 32, context_tokens=16).sequences
    chosen = sample(sequences, documents, 1500)
    names = {s.document for s in chosen}
    assert sum(map(len, chosen)) <= 1500
    assert 3 < len(names) < 40
    assert [s for s in sequences if s.document in names] == list(chosen), "every window, in order"
    fewer = [d for d in documents if d.name in names or int(d.name[-7:-4]) % 2]
    left = tuple(s for s in sequences if s.document in {d.name for d in fewer})
    assert names <= {s.document for s in sample(left, fewer, 1500)}, "what else there is only makes room"
    assert {s.document for s in sample(sequences, documents, 1)} < names, "at least one document"
    assert sample(sequences, documents, 10**9) == sequences


def test_what_is_left_out_of_general_files_is_kept_to_be_said(tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    (tmp_path / "b.docx").write_bytes(b"PK")
    corpus = general_corpus([str(tmp_path)], "text", None)
    assert [document.text for document in corpus.documents] == ["the cat"]
    assert corpus.left_out[0].startswith(f"{tmp_path.name}/b.docx is left out: only .txt")
    assert general_corpus([], "text", None).left_out == ()
