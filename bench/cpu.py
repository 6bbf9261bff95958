"""The demo's model and batch on a CPU: Drawplate against transformers + PEFT in fp32, behind the same gate.

    python examples/fetch_demo.py && python bench/cpu.py OUT.json

SmolLM2-135M's real weights, 8 of the demo's documents an optimizer step, LoRA r=16 on all linear layers, no dropout.
The gate allows what the mission's own stack (NF4, here in bf16) is off by. The peer pads its 8 documents to the
longest, as transformers' Trainer does; Drawplate is timed on the same padded batch and on its own packed row. Processes
take turns, one computing at a time; a ratio is one of medians. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.compare import measure  # noqa: E402
from bench.peers.cases import CORPUS, REFERENCE, Job, Setting  # noqa: E402
from bench.peers.run import Task  # noqa: E402
from bench.peers.table import table  # noqa: E402

MODEL, PADDED, PACKED = "smollm2-135m", "climate-padded-8-8", "climate-packed-2048-8"
PEER = Setting(
    system="mission",
    name="transformers + PEFT, fp32",
    dropout=0.0,
    options={"compute": "float32", "checkpointing": False},
)
YARDSTICK = Setting(system="mission", name="nf4, bf16, checkpointing", dropout=0.0)
BF16 = {"precision": "bf16", "compute": "bfloat16"}
OWN = [
    Setting(system="drawplate", name="fp32", dropout=0.0, options={"precision": "fp32", "compute": "float32"}),
    Setting(system="drawplate", name="bf16", dropout=0.0, options=BF16),
]
COMPILED = Setting(system="drawplate", name="bf16, compiled", dropout=0.0, options={**BF16, "compiled": True})
"""`model.compile: true`, which a CPU has to be asked for: it takes a minute, and each packed row has its own shape."""


def jobs() -> list[Job]:
    """The reference and the yardstick are not timed; peers of transformers do not pack."""
    proven = [(REFERENCE, (PADDED,), ()), (YARDSTICK, (PADDED,), ()), (PEER, (PADDED,), (PADDED,))]
    proven += [(setting, (PADDED, PACKED), (PADDED, PACKED)) for setting in OWN]
    proven += [(COMPILED, (PADDED,), (PADDED,))]
    return [Job(shape=MODEL, setting=setting, cases=cases, timed=timed) for setting, cases, timed in proven]


def make_material(folder: Path) -> None:
    """The demo's model, its documents as token ids, and the adapter's start."""
    from bench.peers.material import save_start
    from drawplate.recipe import load_recipe
    from drawplate.run.prepare import prepare

    recipe = load_recipe(ROOT / "examples" / "climate-demo.yaml")
    prepared = prepare(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    for path in prepared.checkpoint.folder.iterdir():
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    corpus = [sequence.input_ids.tolist() for sequence in prepared.train.sequences]
    (folder / CORPUS).write_text(json.dumps(corpus))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"r": recipe.lora.r, "lora_alpha": int(recipe.lora.lora_alpha), "target_modules": targets}
    save_start(folder, prepared.checkpoint.config, lora)


def ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    """Drawplate's tokens per second over the peer's on its padded batch; only what passed the gate."""
    speeds = {(r["setting"], r["case"]): r["tokens_per_second"] for r in results if "tokens_per_second" in r}
    peer = speeds.get((PEER.name, PADDED))
    own = {key: speed for key, speed in speeds.items() if key[0] in {setting.name for setting in (*OWN, COMPILED)}}
    return {f"{name}, {case}": round(speed / peer, 3) for (name, case), speed in own.items()} if peer else {}


def main() -> int:
    """Write the JSON, print the table and the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gate-steps", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("/tmp/drawplate-cpu"))
    asked = parser.parse_args()
    task = Task(
        work=asked.work,
        material={MODEL: lambda: make_material(asked.work / MODEL)},
        gate_case=PADDED,
        gate_steps=asked.gate_steps,
        rounds=asked.rounds,
        steps=asked.steps,
        overlap=False,
        yardstick=YARDSTICK,
    )
    record = measure(task, [jobs()], asked.out)
    record["ratios"] = ratios(record["results"])
    asked.out.write_text(json.dumps(record, indent=1))
    print(table(record))
    print(
        "\n".join(f"{name}: {ratio:.2f} times transformers + PEFT in fp32" for name, ratio in record["ratios"].items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
