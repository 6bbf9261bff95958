from __future__ import annotations

import copy

import pytest

from drawplate.data.cautions import cautions
from drawplate.data.chat.template import chat_renderer
from drawplate.data.tokens import tokenize
from drawplate.records import Document

TALK = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
HEADINGS = "{% for m in messages %}{{ '## ' + m.role + '\\n' + m.content + '\\n\\n' }}{% endfor %}"


def changed(tokenizer, **values):
    other = copy.deepcopy(tokenizer)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def said(tokenizer, documents, length=64) -> tuple[str, ...]:
    return cautions(documents, tokenize(documents, tokenizer, length, append_eos=True), tokenizer, length)


def chat(tokenizer) -> Document:
    c = chat_renderer(tokenizer)(TALK)
    return Document(name="chat", text=c.text, sha256="", trained_spans=c.trained_spans, control_spans=c.control_spans)


PLAIN = Document(name="plain", text="the cat sat", sha256="")


def test_nothing_is_said_where_ends_are_learnt(tokenizer):
    assert said(tokenizer, [chat(tokenizer), PLAIN]) == ()


def test_a_template_that_closes_no_answer_is_said(tokenizer):
    headings = changed(tokenizer, chat_template=HEADINGS)
    [line] = said(headings, [chat(headings), PLAIN])
    assert "the last answer of 1 of 1 conversations with no control token: the model will not learn to stop" in line


def test_a_tokenizer_without_an_end_is_said(tokenizer):
    [line] = said(changed(tokenizer, eos_token=None), [PLAIN])
    assert "no end-of-sequence token, so nothing ends 1 of 1 training documents" in line
    assert "will not learn to stop" in line


@pytest.mark.parametrize(("length", "count"), [(64, 0), (16, 1)])
def test_prompts_that_do_not_fit_are_said_with_their_tokens(tokenizer, length, count):
    text = "the sea " * 12 + "a mat"
    long = Document(name="long", text=text, sha256="", trained_spans=((len(text) - 5, len(text)),))
    lines = said(tokenizer, [long, PLAIN], length)
    assert len(lines) == count
    if count:
        lost = tokenize([long], tokenizer, length, append_eos=True).ledger.dropped_tokens
        assert lines[0].startswith("1 of 2 training documents are longer than data.max_length (16 tokens)")
        assert f"{lost} tokens of prompts are read nowhere" in lines[0]
