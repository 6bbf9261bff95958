from __future__ import annotations

import json

import numpy as np
import pytest

from bench.peers.cases import CLIMATE_LENGTHS, MISSION, documents, parse_case, settings


def test_a_case_of_equal_rows() -> None:
    case = parse_case("7x512")
    assert case.micro_batches == ((512,) * 7,)
    assert case.tokens == 3584


@pytest.mark.parametrize("name", ["", "7", "7x", "x512", "0x512", "7x1", "climate", "climate-packed-4096", "other-1-2"])
def test_what_is_no_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no case"):
        parse_case(name)


def test_padded_and_packed_hold_the_same_documents() -> None:
    padded, packed = parse_case("climate-padded-7-28"), parse_case("climate-packed-4096-28")
    assert [len(rows) for rows in padded.micro_batches] == [7, 7, 7, 7]
    assert [len(rows) for rows in packed.micro_batches] == [28]
    assert sorted(sum(padded.indices, ())) == sorted(sum(packed.indices, ()))
    assert padded.tokens == packed.tokens
    assert (padded.packed_tokens, packed.packed_tokens) == (0, 4096)


def test_tokens_are_the_same_for_everybody_and_differ_between_steps() -> None:
    case = parse_case("2x64")
    first, again, next_step = documents(case, 0, 1000), documents(case, 0, 1000), documents(case, 1, 1000)
    assert all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not np.array_equal(first[0][0], next_step[0][0])
    assert max(ids.max() for ids in first[0]) < 1000


def test_a_corpus_gives_the_documents_of_a_case_of_real_lengths() -> None:
    case = parse_case("climate-padded-2-4")
    corpus = [[i] * 3 for i in range(2000)]
    given = documents(case, 5, 10, corpus)
    assert [[int(ids[0]) for ids in rows] for rows in given] == [list(rows) for rows in case.indices]


def test_the_missions_stack_is_always_there_to_measure_the_gate_by() -> None:
    assert settings(["drawplate"], [None])[0] == MISSION
    assert settings(["drawplate"], [6.0])[0] == MISSION
    assert all(s.budget_gib == 6 for s in settings(["drawplate"], [6.0])[1:])
    labels = [s.label for s in settings(["drawplate", "unsloth", "liger", "trl", "mission"], [None, 6.0, 8.0])]
    assert len(labels) == len(set(labels))


def test_an_unknown_system_is_refused() -> None:
    with pytest.raises(ValueError, match="nobody"):
        settings(["nobody"], [None])


def test_what_padding_wastes_is_what_docs_speed_says() -> None:
    def wasted(count: int, multiple: int, seed: int = 0) -> float:
        lengths = json.loads(CLIMATE_LENGTHS.read_text(encoding="utf-8"))["lengths"]
        chosen = [lengths[i] for i in np.random.default_rng(seed).permutation(len(lengths))[:count]]
        rows = [chosen[i : i + 7] for i in range(0, count, 7)]
        return sum(len(row) * -(-max(row) // multiple) * multiple for row in rows) / sum(chosen)

    assert round(wasted(28, 16), 2) == 1.79
    assert [round(wasted(918, 16, seed), 2) for seed in range(3)] == [1.69, 1.66, 1.66]
