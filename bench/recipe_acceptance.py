"""The default recipe through `drawplate.tune`, nothing set but the model and the files, on the study's three corpora.

    python bench/recipe_acceptance.py FOLDER OUT.json [--compile] [--device cpu] [--model FOLDER]
        [--cases climate:nf4,code:nf4] [--set KEY=VALUE ...]

FOLDER is what `bench/recipe_study.py corpora` wrote. Climate articles are learnt in NF4 and in the precision that the
plan chooses, functions and manual pages in NF4; and the climate articles once more as an earlier rule divided them: a
second set of held-out articles. The runs share the device, one process each. OUT.json holds the verdict of each:
perplexity before and after, its interval, and that of general text; it is written anew after each run. The layer
function is not compiled unless asked for: a minute of compiling would be most of a run this short, and changes its
numbers by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from bench.about import about  # noqa: E402
from bench.recipe_study import MODEL  # noqa: E402

CASES = (
    ("climate", "nf4"),
    ("climate", "auto"),
    ("code", "nf4"),
    ("manual", "nf4"),
    ("climate-earlier", "nf4"),
    ("climate-earlier", "auto"),
)
ADVISED = ("learning_rate", "effective_batch_size", "num_train_epochs", "lr_scheduler_type", "warmup_ratio")


def data_of(corpus: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """The recipe's section. The earlier rule held out what a hash of the words, read as a number, put below a tenth."""
    from drawplate.data.readers.rows import words_sha256

    name, _, earlier = corpus.partition("-")
    if not earlier:
        return {"files": str(folder / f"{name}.jsonl")}
    sides: dict[bool, list[str]] = {True: [], False: []}
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        sides[int(words_sha256(json.loads(line)["text"])[:13], 16) / 16**13 < 0.1].append(line)
    for held, lines in sides.items():
        (scratch / f"{held}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "files": str(scratch / "False.jsonl"),
        "heldout_files": str(scratch / "True.jsonl"),
        "near_duplicates": "keep",
    }


def tune(corpus: str, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process; what came of it."""
    import torch

    import drawplate
    from drawplate.recipe import load_recipe

    torch.set_num_threads(2)
    model = {"name_or_path": given.model} if given.model else MODEL
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        recipe = load_recipe(
            {
                "model": {**model, "device_map": given.device, "compile": "auto" if given.compile else False},
                "data": data_of(corpus, given.folder, Path(folder)),
                "quantization": {"precision": precision},
                "output_dir": f"{folder}/run",
            },
            given.set,
        )
        record = drawplate.tune(recipe)
        seconds = time.monotonic() - began
    values = json.loads(json.dumps(drawplate.records.to_json(record)))
    return {
        "corpus": corpus,
        "set": given.set,
        "precision": values["model"]["precision"],
        "seconds": round(seconds, 1),
        "evaluation": values["evaluation"],
        "training": values["training"],
        "data": values["data"],
        "advised": {name: values["recipe"]["train"][name] for name in ADVISED} | values["recipe"]["lora"],
        "warnings": values["warnings"],
        "machine": values["machine"],
        "versions": values["versions"],
    }


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model")
    parser.add_argument("--cases", default=",".join(":".join(case) for case in CASES))
    parser.add_argument("--set", action="append", default=[], help="a recipe's key=value, for every case")
    parser.add_argument("--case", help="corpus:precision; used by this script itself")
    given = parser.parse_args()
    if given.case:
        corpus, _, precision = given.case.partition(":")
        given.out.write_text(json.dumps(tune(corpus, precision, given)))
        return
    running = {}
    with tempfile.TemporaryDirectory() as folder:
        for corpus, precision in (case.split(":") for case in given.cases.split(",")):
            part = Path(folder) / f"{corpus}-{precision}.json"
            own = [*sys.argv[1:2], str(part), *sys.argv[3:], "--case", f"{corpus}:{precision}"]
            running[part] = subprocess.Popen([sys.executable, __file__, *own])
        results: list[dict[str, Any]] = []
        while running:
            time.sleep(1)
            for part, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[part]
                if not part.exists():
                    print(f"{part.stem} failed with exit code {process.returncode}", flush=True)
                    continue
                result = json.loads(part.read_text())
                results.append(result)
                facts = result["evaluation"]
                print(
                    f"{part.stem}: {facts['baseline']['perplexity']:.2f} -> {facts['final']['perplexity']:.2f}, "
                    f"{facts['perplexity_change_percent']:.1f} % {facts['change_ci95_percent']}, "
                    f"{result['seconds']} s",
                    flush=True,
                )
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps({**about(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
