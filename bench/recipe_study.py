"""Which recipe learns best: rate, batch, rank, targets and the rest, on one small model and corpora of several kinds.

    python bench/recipe_study.py corpora FOLDER          # here: climate articles, Python functions, manual pages
    python bench/recipe_study.py run FOLDER OUT.json [--workers 6] [--minutes 5.5] [--model FOLDER] [--device cpu]

`corpora` writes .jsonl files of some 0.6 MB each, from the demo's page (examples/fetch_demo.py), the standard library
and the installed manual pages; a general.jsonl beside them is not written here and is measured where it exists. `run`
trains with Drawplate's own parts, in three stages of which each rests on the one before: a grid of learning rate and
tokens per optimizer step; single changes to its best point; then that point, the changes that paid and all of them
together, with more seeds, in NF4 and in bf16. Several processes share the device: a step of a model this small is bound
by launches. What is compared is equal tokens, not equal time.

Every run is a line of OUT.json: its recipe, its seed, and after each epoch the nats and tokens of the corpus's held-out
documents and of other text: the held-out documents of the other corpora, and general.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import gzip
import json
import math
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

CORPORA = ("climate", "code", "manual")
GENERAL = "general"
LINEARS_QV = ("q_proj", "v_proj")
EMA_DECAY = 0.98
MODEL = {"name_or_path": "${DRAWPLATE_CACHE}/demo/smollm2-135m", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


# --- corpora -----------------------------------------------------------------------------------------------------


def write_corpora(folder: Path) -> None:
    """The three corpora, each some 120 thousand tokens, as rows of {"text", "name"}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("climate", climate_texts()), ("code", code_texts()), ("manual", manual_texts())):
        rows = [json.dumps({"name": title, "text": text}, ensure_ascii=False) + "\n" for title, text in texts]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        print(f"{name}: {len(texts)} documents, {sum(len(text) for _, text in texts):,} characters")


def climate_texts() -> list[tuple[str, str]]:
    """The demo's documents, cut as its recipe cuts them."""
    from drawplate.data.documents import read_documents
    from drawplate.recipe import load_recipe

    section = load_recipe(ROOT / "examples" / "climate-demo.yaml").data
    return [(d.name, d.text) for d in read_documents(section, section.files).documents]


def code_texts(characters: int = 560_000) -> list[tuple[str, str]]:
    """Functions and classes of the standard library, 300 to 4,000 characters each."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = ast.get_source_segment(source, node) or ""
                if 300 <= len(text) <= 4000:
                    found.append((f"{path.name}:{node.name}", text))
    return _some(found, characters)


def manual_texts(characters: int = 560_000) -> list[tuple[str, str]]:
    """The first 4,000 characters of manual pages on programs; generated families of hundreds of pages are left out."""
    found = []
    for path in sorted([*Path("/usr/share/man/man1").glob("*.gz"), *Path("/usr/share/man/man8").glob("*.gz")]):
        if path.name.startswith(("gcloud", "llvm", "clang")):
            continue
        try:
            source = gzip.decompress(path.read_bytes())
        except OSError:
            continue
        page = subprocess.run(["groff", "-mandoc", "-Tutf8", "-P-c", "-rLL=90n"], input=source, capture_output=True)
        text = re.sub(".\b|\x1b\\[[0-9;]*m", "", page.stdout.decode("utf-8", "replace"))
        text = re.sub(r"\n{3,}", "\n\n", text).strip()[:4000]
        if len(text) >= 1000:
            found.append((path.name, text))
    return _some(found, characters)


def _some(found: list[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    random.Random(0).shuffle(found)
    count, total = 0, 0
    while count < len(found) and total < characters:
        total += len(found[count][1])
        count += 1
    return found[:count]


# --- one run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A recipe under study."""

    precision: str = "nf4"
    rate: float = 1e-3
    step_tokens: int = 2048
    epochs: float = 3
    schedule: str = "cosine"
    warmup: float = 0.05
    r: int = 16
    alpha: float = 32
    rslora: bool = False
    targets: str = "all-linear"
    loraplus: float = 1.0
    dropout: float = 0.0
    start: str = "zero"  # or "error": the leading part of the quantization error (LoftQ's first step)

    def label(self, other: Variant) -> str:
        """What distinguishes it from another."""
        changed = {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(other, k)}
        return ", ".join(f"{k} {v}" for k, v in changed.items()) or "the base"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    corpus: str
    variant: Variant
    seed: int
    stage: str


@dataclass(frozen=True)
class Setting:
    """What every run shares."""

    folder: str
    model: tuple[tuple[str, str], ...]
    device: str
    dtype: str


class Workplace:
    """A process's model and tokens, kept from one run to the next."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from drawplate.data.tokens import load_tokenizer
        from drawplate.model.weights import open_checkpoint
        from drawplate.recipe import ModelSection

        torch.set_num_threads(2)
        self.setting, self.device = setting, torch.device(setting.device)
        self.checkpoint = open_checkpoint(ModelSection(**dict(setting.model)))  # type: ignore[arg-type]
        self.tokenizer = load_tokenizer(self.checkpoint.folder)
        self.loaded: tuple[Any, Any] = (None, None)

    @functools.cache  # noqa: B019 - one object a process
    def tokens(self, name: str) -> tuple[Any, Any]:
        """Training and held-out windows of a corpus; of the general text, which is not split, only the latter."""
        from drawplate.data.documents import read_documents
        from drawplate.data.split import split
        from drawplate.data.tokens import tokenize
        from drawplate.recipe import DataSection

        section = DataSection(files=[str(Path(self.setting.folder) / f"{name}.jsonl")])
        documents = read_documents(section, section.files).documents
        length = min(2048, self.checkpoint.config.max_position_embeddings)
        if name == GENERAL:
            return None, tokenize(documents, self.tokenizer, length)
        sides = split(documents, section)
        train = tokenize(sides.train, self.tokenizer, length, append_eos=True)
        return train, tokenize(sides.heldout, self.tokenizer, length)

    def model(self, variant: Variant, seed: int) -> Any:
        """The assembled model with a fresh adapter."""
        import torch

        from drawplate.model.adapter import Adapter, lora_config
        from drawplate.model.assemble import assemble
        from drawplate.model.causal_lm import Placement
        from drawplate.model.frozen import Storage
        from drawplate.recipe import LoraSection

        section = LoraSection(
            r=variant.r,
            lora_alpha=variant.alpha,
            use_rslora=variant.rslora,
            lora_dropout=variant.dropout,
            target_modules="all-linear" if variant.targets == "all-linear" else list(LINEARS_QV),
        )
        key = (variant.precision, section.model_dump_json())
        if self.loaded[0] != key:
            self.loaded = (None, None)
            quantized = variant.precision in ("nf4", "fp4")
            placement = Placement(
                device=self.device,
                storage=Storage(variant.precision, quantized),
                compute_dtype=getattr(torch, self.setting.dtype),
                weights="dequantized" if quantized else "device",
            )
            self.loaded = (
                key,
                assemble(
                    self.checkpoint, placement, lambda anatomy: lora_config(section, anatomy, "study", None), seed=seed
                ),
            )
        model = self.loaded[1]
        shapes = [{name: tuple(p.shape) for name, p in layer.items()} for layer in model.adapter.layers]
        fresh = Adapter(model.adapter.config, model.adapter.layers_path, shapes, seed=seed, device=self.device)
        model.adapter.load_state(fresh.state(), "a fresh adapter")
        return model

    def start_from_error(self, model: Any, variant: Variant) -> None:
        """B A = the best rank-r approximation of W - Q(W): one step of LoftQ (Li et al. 2023), with Q(W) kept."""
        import torch

        from drawplate.model.frozen import Storage

        storage, state = Storage(variant.precision, True), model.adapter.state()
        scaling = variant.alpha / (math.sqrt(variant.r) if variant.rslora else variant.r)
        for name in [n for n in state if n.endswith("lora_A.weight")]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            file_name = next(
                n for n in (f"{path}.weight", f"{path}.weight".removeprefix("model.")) if n in self.checkpoint.files
            )
            weight = self.checkpoint.read(file_name).to(self.device, torch.bfloat16)
            kept = storage.encode(weight)
            shape = (weight.shape[0], weight.shape[1])
            error = weight.float() - storage.decode([kept[k] for k in storage.specs(*shape)], shape, torch.float32)
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(error, q=variant.r + 8, niter=4)
            root = s[: variant.r].sqrt() / math.sqrt(scaling)
            state[name] = (v[:, : variant.r] * root).T.contiguous()
            state[name.replace("lora_A", "lora_B")] = (u[:, : variant.r] * root).contiguous()
        model.adapter.load_state(state, "the quantization error")

    def sums(self, model: Any, names: list[str]) -> dict[str, list[float]]:
        """[nats, tokens] of each corpus's held-out documents."""
        from drawplate.evaluate import score_documents, total
        from drawplate.train import Cutting

        cutting = Cutting(packing=True, tokens=16384)
        results = {}
        for name in names:
            windows = self.tokens(name)[1].sequences
            result = total(score_documents(model, windows, cutting(windows)))
            results[name] = [result.nats, result.tokens]
        return results

    def run(self, job: Job) -> dict[str, Any]:
        """Train and measure; the line of OUT.json."""
        from drawplate.data.batches import steps_per_epoch
        from drawplate.recipe import TrainSection
        from drawplate.train import Cutting, TrainState, TrainTask, train

        variant = job.variant
        model = self.model(variant, job.seed)
        names = [n for n in (*CORPORA, GENERAL) if (Path(self.setting.folder) / f"{n}.jsonl").exists()]
        before = self.sums(model, names)
        if variant.start == "error":
            self.start_from_error(model, variant)
        windows = self.tokens(job.corpus)[0].sequences
        mean = sum(len(w) for w in windows) / len(windows)
        batch = max(1, round(variant.step_tokens / mean))
        an_epoch = steps_per_epoch(len(windows), batch)
        steps = max(1, math.ceil(an_epoch * variant.epochs))
        points: list[dict[str, Any]] = []
        listener = _Averaging(model)
        task = TrainTask(
            model=model,
            sequences=windows,
            cutting=Cutting(packing=True, tokens=16384),
            effective_batch=batch,
            schedule=schedule_of(variant, steps),
            section=TrainSection(seed=job.seed),
            loraplus_lr_ratio=variant.loraplus,
            evaluate=lambda: points.append(self.sums(model, names)) or _total_of(points[-1][job.corpus]),  # type: ignore[func-returns-value]
            eval_steps=an_epoch,
            keep_best=False,
        )
        began = time.monotonic()
        state = train(task, listener, TrainState())
        seconds = time.monotonic() - began
        points = points if steps % an_epoch == 0 else [*points, self.sums(model, names)]
        listener.use_average()
        return {
            **dataclasses.asdict(job),
            "sequences_per_step": batch,
            "steps": steps,
            "mean_window_tokens": round(mean, 1),
            "train_seconds": round(seconds, 2),
            "step_seconds": round(state.step_seconds, 2),
            "before": before,
            "epochs": points,
            "averaged": self.sums(model, names),
        }


def _total_of(sums: list[float]) -> Any:
    from drawplate.records import Evaluation

    return Evaluation(nats=sums[0], tokens=int(sums[1]), bytes=1)


def schedule_of(variant: Variant, steps: int) -> Any:
    """Drawplate's schedule, or one it does not have: constant until the last fifth, then linear to zero."""
    from drawplate.train import Schedule

    class ConstantThenDecay(Schedule):
        def rate(self, step: int, seconds: float) -> float:
            warm = min(1.0, (step + 1) / max(1.0, self.warmup_ratio * self.steps))
            return self.peak_rate * warm * min(1.0, (self.steps - step) / (0.2 * self.steps))

    if variant.schedule == "constant then decay":
        return ConstantThenDecay(steps=steps, peak_rate=variant.rate, kind="", warmup_ratio=variant.warmup)
    return Schedule(steps=steps, peak_rate=variant.rate, kind=variant.schedule, warmup_ratio=variant.warmup)


class _Averaging:
    """A listener that keeps an exponential moving average of the adapter."""

    def __init__(self, model: Any) -> None:
        self.adapter = model.adapter
        self.average = {n: p.detach().clone() for n, p in model.adapter.named_tensors().items()}

    def on_step(self, record: Any, progress: float) -> None:
        import torch

        # A short average at first, so that the start is forgotten (as in Polyak averaging with a warm-up).
        decay = min(EMA_DECAY, (1 + record.step) / (10 + record.step))
        current = self.adapter.named_tensors()
        torch._foreach_lerp_(list(self.average.values()), [current[n].detach() for n in self.average], 1 - decay)

    def use_average(self) -> None:
        self.adapter.load_state({n: p.cpu() for n, p in self.average.items()}, "the average")

    def on_micro_batch(self, *_: Any) -> None:
        pass

    on_evaluation = on_warning = on_micro_batch


# --- the study ---------------------------------------------------------------------------------------------------

Line = dict[str, Any]


def log_ratio(line: Line, name: str | None = None, key: str = "epochs") -> float:
    """ln(perplexity after / before) on a held-out corpus, by default the one trained on."""
    name = name or line["corpus"]
    after, before = (line["epochs"][-1] if key == "epochs" else line[key])[name], line["before"][name]
    return float(after[0] / after[1] - before[0] / before[1])


def mean_of(lines: list[Line], variant: Variant) -> float:
    """Mean over corpora (and seeds) of a variant's log ratio; infinite where it was not run."""
    own = [log_ratio(line) for line in lines if line["variant"] == dataclasses.asdict(variant)]
    return statistics.fmean(own) if own else math.inf


def everywhere(variants: list[Variant], stage: str, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    """A job for each variant, corpus and seed, those that load the same model side by side."""
    ordered = sorted(dict.fromkeys(variants), key=lambda v: (v.precision, v.r, v.targets, v.alpha, v.rslora))
    return [Job(corpus=c, variant=v, seed=s, stage=stage) for v in ordered for s in seeds for c in CORPORA]


def grid(_: list[Line]) -> list[Job]:
    """Rate against tokens per step."""
    points = [(rate, tokens) for rate in (2e-4, 5e-4, 1e-3, 2e-3, 4e-3) for tokens in (1024, 2048, 4096)]
    left_out = {(2e-4, 4096), (4e-3, 1024), (4e-3, 2048)}
    return everywhere([Variant(rate=r, step_tokens=t) for r, t in points if (r, t) not in left_out], "grid")


def best_of(lines: list[Line], stage: str) -> Variant:
    """The variant with the lowest mean of a stage."""
    variants = {json.dumps(line["variant"]): Variant(**line["variant"]) for line in lines if line["stage"] == stage}
    return min(variants.values(), key=lambda variant: mean_of(lines, variant))


CHANGES: tuple[dict[str, Any], ...] = (
    {"r": 8, "alpha": 16},
    {"r": 32, "alpha": 64},
    {"r": 64, "alpha": 128},
    {"alpha": 64},
    {"rslora": True, "alpha": 8},
    {"r": 64, "alpha": 16, "rslora": True},
    {"targets": "qv"},
    {"loraplus": 4.0},
    {"loraplus": 16.0},
    {"schedule": "linear"},
    {"schedule": "constant then decay"},
    {"warmup": 0.0},
    {"warmup": 0.1},
    {"dropout": 0.05},
    {"start": "error"},
    {"epochs": 2},
    {"epochs": 5},
)


def changed(base: Variant, change: dict[str, Any]) -> Variant:
    """One change; a larger rate for B comes with a smaller one for A, so that their geometric mean stays."""
    rate = base.rate / math.sqrt(change.get("loraplus", 1.0))
    return replace(base, rate=rate, **change)


def single_changes(lines: list[Line]) -> list[Job]:
    """Each change to the grid's best point."""
    base = best_of(lines, "grid")
    return everywhere([changed(base, change) for change in CHANGES], "single")


def finalists(lines: list[Line]) -> list[Job]:
    """The best point, each change that paid, and all of them together, with more seeds; and in bf16."""
    base = best_of(lines, "grid")
    gains = {i: mean_of(lines, base) - mean_of(lines, changed(base, change)) for i, change in enumerate(CHANGES)}
    paid = [i for i in sorted(gains, key=lambda i: -gains[i]) if gains[i] > 0.005 and "epochs" not in CHANGES[i]][:3]
    together = base
    for i in reversed(paid):
        together = changed(together, CHANGES[i])
    variants = [base, together, *(changed(base, CHANGES[i]) for i in paid[:2])]
    jobs = everywhere(variants, "finalists", (1, 2))
    plain = [replace(v, precision="bf16", start="zero") for v in (base, together)]
    return jobs + everywhere(plain, "bf16", (0, 1))


STAGES: tuple[Callable[[list[Line]], list[Job]], ...] = (grid, single_changes, finalists)

_workplace: Workplace | None = None


def _enter(setting: Setting) -> None:
    global _workplace
    _workplace = Workplace(setting)


def _work(job: Job) -> Line:
    assert _workplace is not None
    return _workplace.run(job)


def study(setting: Setting, out: Path, workers: int, minutes: float) -> None:
    """All stages; OUT.json is written anew after each, and as it is when the time is up."""
    from drawplate.model.weights import open_checkpoint
    from drawplate.recipe import ModelSection

    open_checkpoint(ModelSection(**dict(setting.model)))  # type: ignore[arg-type]  # a GGUF is converted once, here
    began, lines = time.monotonic(), []  # type: ignore[var-annotated]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(setting,)) as pool:
        for stage in STAGES:
            jobs = stage(lines)
            futures = [pool.submit(_work, job) for job in jobs]
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                lines.append(future.result())
                if time.monotonic() - began > 60 * minutes:
                    for other in futures:
                        other.cancel()
            write(out, setting, lines, time.monotonic() - began)
            print(f"{stage.__name__}: {len(lines)} runs, {time.monotonic() - began:.0f} s", flush=True)
            if time.monotonic() - began > 60 * minutes:
                break


def write(out: Path, setting: Setting, lines: list[Line], seconds: float) -> None:
    """Every run, and a table of means."""
    import torch

    from drawplate.device import machine

    facts = {
        "command": " ".join(["python", "bench/recipe_study.py", *sys.argv[1:]]),
        "machine": dataclasses.asdict(machine(torch.device(setting.device))),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "table": table(lines),
        "runs": sorted(
            lines, key=lambda line: (line["stage"], json.dumps(line["variant"]), line["corpus"], line["seed"])
        ),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")


def table(lines: list[Line]) -> list[dict[str, Any]]:
    """A row a variant: percent change of perplexity by corpus, its mean, and of text of other kinds, best first."""
    rows = []
    for key in dict.fromkeys(json.dumps(line["variant"]) for line in lines):
        own = [line for line in lines if json.dumps(line["variant"]) == key]
        row: dict[str, Any] = {"variant": Variant(**json.loads(key)).label(Variant()), "runs": len(own)}
        for corpus in CORPORA:
            ratios = [log_ratio(line) for line in own if line["corpus"] == corpus]
            if ratios:
                row[corpus] = round(100 * math.expm1(statistics.fmean(ratios)), 2)
                row[f"{corpus}_spread"] = round(100 * statistics.stdev(ratios), 2) if len(ratios) > 1 else None
        row["mean"] = round(100 * math.expm1(statistics.fmean(map(log_ratio, own))), 2)
        row["averaged"] = round(100 * math.expm1(statistics.fmean(log_ratio(x, key="averaged") for x in own)), 2)
        others = [log_ratio(x, n) for x in own for n in x["before"] if n not in (x["corpus"], GENERAL)]
        row["other_corpora"] = round(100 * math.expm1(statistics.fmean(others)), 2) if others else None
        general = [log_ratio(x, GENERAL) for x in own if GENERAL in x["before"]]
        row["general"] = round(100 * math.expm1(statistics.fmean(general)), 2) if general else None
        row["train_seconds"] = round(statistics.fmean(x["train_seconds"] for x in own), 1)
        rows.append(row)
    return sorted(rows, key=lambda row: row["mean"])


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["corpora", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--model", help="a model's folder, instead of the demo's")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.what == "corpora":
        write_corpora(given.folder)
        return
    model = {"name_or_path": given.model} if given.model else MODEL
    dtype = "bfloat16" if given.device == "cuda" else "float32"
    setting = Setting(str(given.folder), tuple(model.items()), given.device, dtype)
    study(setting, given.out, given.workers, given.minutes)


if __name__ == "__main__":
    main()
