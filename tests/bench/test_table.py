from __future__ import annotations

from typing import Any

from bench.peers.table import best_within, table

GATE = {"difference": 0.001, "allowed": 0.02, "reason": "", "gradient_error": 0.1}


def result(system: str, setting: str, speed: float | None, gib: float, **more: Any) -> dict[str, Any]:
    numbers = {
        "peak_reserved_bytes": int(gib * 2**30),
        "process_device_bytes": None,
        "first_step_seconds": 20.0,
        "first_loss": 12.0,
        "last_loss": 11.0,
        "gate": GATE,
    }
    outcome = {"tokens_per_second": speed} if speed else {"refused": "gate: a gradient is zero"}
    entry = {"system": system, "setting": setting, "dropout": 0.1, "budget_gib": None, "case": "7x512", "model": "3b"}
    return entry | numbers | outcome | more


RESULTS = [
    result("drawplate", "bf16", 40000.0, 30.0),
    result("drawplate", "nf4", 20000.0, 4.0),
    result("unsloth", "bf16", 30000.0, 28.0),
    result("unsloth", "nf4", 10000.0, 3.0),
    result("liger", "broken", None, 3.0),
]
RECORD: dict[str, Any] = {"machine": {"gpu": "H100"}, "results": RESULTS}


def test_a_table_shows_speeds_and_says_why_there_is_none() -> None:
    text = table(RECORD)
    assert "| drawplate | bf16 | 0.1 | 7x512 | 40,000 | 30.00 |" in text
    assert "- liger: broken, dropout 0.1, 7x512: gate: a gradient is zero" in text
    assert "| liger |" not in text


def test_a_machine_without_a_gpu_is_named_so() -> None:
    assert table(RECORD | {"machine": {"cpu": "a processor"}}).startswith("### 3b, CPU")


def test_a_budget_leaves_out_what_needs_more() -> None:
    assert best_within(RESULTS, "7x512", None)["drawplate"]["setting"] == "bf16"
    assert best_within(RESULTS, "7x512", 6)["drawplate"]["setting"] == "nf4"
    assert "unsloth" not in best_within(RESULTS, "7x512", 2)


def test_a_budget_holds_the_whole_process_where_that_is_known() -> None:
    context = 800 * 2**20
    held = [result("unsloth", "nf4", 1.0, 5.5, process_device_bytes=int(5.5 * 2**30) + context)]
    assert not best_within(held, "7x512", 6)
    assert best_within(held, "7x512", 6.5)


def test_what_the_planner_kept_stands_beside_its_setting() -> None:
    decided = {"kept_layers": 18, "host_kept_layers": 9}
    text = table(RECORD | {"results": [result("drawplate", "nf4 plan", 1.0, 5.5, decided=decided)]})
    assert "| nf4 plan, 18 layers kept, 9 on the host |" in text
    text = table(RECORD | {"results": [result("unsloth", "nf4", 1.0, 5.5, decided={"kept_layers": 18})]})
    assert "| nf4, 18 layers kept |" in text
