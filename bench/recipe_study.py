"""Which recipe learns best: rate, batch, rank, targets and the rest, on one small model and corpora of several kinds.

    python bench/recipe_study.py corpora FOLDER          # here: climate articles, Python functions, manual pages
    python bench/recipe_study.py run FOLDER OUT.jsonl [--seconds 200] [--skip N] [--model FOLDER] [--device cpu]
    python bench/recipe_study.py table OUT.jsonl OUT.json

`corpora` writes .jsonl files of some 0.6 MB each, from the demo's page (examples/fetch_demo.py), the standard library
and the installed manual pages. `run` trains, and measures the held-out documents and the general English prose that
Drawplate ships, which shows what was forgotten; `table` puts means over seeds and intervals over documents together.

A model so small is bound by launches, so all recipes of a group are trained at once: V copies of every micro-batch lie
end to end in one row, go through the same frozen weights, and each meets its own adapter in a batched product. Their
gradients do not mix, so each learns as if it were alone; tests/bench/test_recipe_study.py holds that against
Drawplate's own loop. Rates, schedules, scalings and starts may differ within a group; corpus, precision, batch, epochs
and seed may not. Adapters of smaller rank, or on fewer layers, are zero elsewhere on both sides, and stay so. Three
processes, one a corpus, share the device. What is compared is equal tokens, not equal time. A line of OUT.jsonl is
written after each group, so what is done is kept whenever it ends.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
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
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

CORPORA = ("climate", "code", "manual")
GENERAL = "general"
EMA_DECAY = 0.98
ROW_TOKENS = 10_240
LOSS_ROWS = 4096
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


# --- what is studied ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What may differ within a group. `rate` is the A matrices'; `start` is zero or error."""

    rate: float = 1e-3
    schedule: str = "cosine"
    warmup: float = 0.05
    r: int = 16
    scale: float = 2.0
    targets: str = "all"
    loraplus: float = 1.0
    start: str = "zero"
    dropout: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """Of the peak rate, at the step about to be taken; Drawplate's own where it has the schedule."""
        from drawplate.train import Schedule

        if self.schedule == "constant then decay":  # constant until the last fifth, then linear to zero
            warm = min(1.0, (step + 1) / max(1.0, self.warmup * steps))
            return warm * min(1.0, (steps - step) / (0.2 * steps))
        return Schedule(steps=steps, peak_rate=1.0, kind=self.schedule, warmup_ratio=self.warmup).rate(step, 0.0)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Variants that are trained together."""

    corpus: str
    variants: tuple[Variant, ...]
    precision: str = "nf4"
    step_tokens: int = 2048
    epochs: int = 3
    seed: int = 0


def changed(base: Variant, **change: Any) -> Variant:
    """One change; a larger rate for B comes with a smaller one for A, so that their geometric mean stays."""
    return replace(base, rate=base.rate / math.sqrt(change.get("loraplus", 1.0)), **change)


BASE = Variant()
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
CHANGES = (
    changed(BASE, targets="qv"),
    changed(BASE, loraplus=16.0),
    changed(BASE, start="error"),
    replace(BASE, targets="qv", rate=2e-3),
    changed(BASE, scale=8.0),  # rank-stabilised: alpha / sqrt(r) = 32 / 4
    changed(BASE, loraplus=4.0),
    changed(BASE, schedule="linear"),
    changed(BASE, schedule="constant then decay"),
    changed(BASE, warmup=0.0),
    changed(BASE, warmup=0.1),
)
RANKS = (
    BASE,
    replace(BASE, r=8),
    replace(BASE, r=32),
    replace(BASE, r=64),
    replace(BASE, r=64, scale=4.0),  # rank-stabilised: the scale of rank 16 times sqrt(64 / 16)
)
REFINED = tuple(
    replace(BASE, **{"rate": 7e-4, **change})
    for change in (
        {},
        {"r": 32},
        {"dropout": 0.1},
        {"rate": 1e-3, "dropout": 0.1},
        {"schedule": "linear"},
        {"schedule": "constant then decay"},
    )
)
AGAIN = (
    *(replace(BASE, rate=rate) for rate in (5e-4, 1e-3, 2e-3)),
    *(change for change in CHANGES if change.loraplus > 1 or change.start != "zero" or "then" in change.schedule),
)


def rates(*chosen: float) -> tuple[Variant, ...]:
    """The base at several rates."""
    return tuple(replace(BASE, rate=rate) for rate in chosen)


def groups_of(corpus: str) -> list[Group]:
    """In the order of what they decide."""
    base = Group(corpus=corpus, variants=())
    return [
        replace(base, variants=(*rates(*RATES), *CHANGES[:3])),
        replace(base, variants=(*rates(5e-4, 1e-3, 2e-3), changed(BASE, loraplus=4.0)), precision="bf16"),
        replace(base, variants=REFINED),
        replace(base, variants=CHANGES[3:]),
        replace(base, variants=rates(5e-4, 1e-3, 2e-3, 4e-3), step_tokens=4096),
        replace(base, variants=AGAIN, seed=1),
        replace(base, variants=RANKS),
        replace(base, variants=rates(2e-4, 5e-4, 1e-3, 2e-3), step_tokens=1024),
        replace(base, variants=AGAIN, seed=2),
        replace(base, variants=rates(5e-4, 1e-3, 2e-3), precision="bf16", seed=1),
        replace(base, variants=rates(5e-4, 1e-3, 2e-3), epochs=5),
    ]


# --- training V adapters at once ---------------------------------------------------------------------------------


class Adapters:
    """V adapters of every linear layer of the decoder, all numbers of one adapter in one row of a matrix.

    Shapes: V variants, I inputs, O outputs, R the largest rank. All A matrices (V, I, R) come first, then all B
    matrices (V, R, O).
    """

    def __init__(self, model: Any, variants: tuple[Variant, ...], seed: int) -> None:
        import torch

        self.variants, self.rank = variants, max(v.r for v in variants)
        self.linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
        device = next(model.parameters()).device
        shapes = [(m.in_features, self.rank) for m in self.linears.values()]
        shapes += [(self.rank, m.out_features) for m in self.linears.values()]
        sizes = [rows * columns for rows, columns in shapes]
        self.a_numbers = sum(sizes[: len(self.linears)])
        self.values, self.gradients = (torch.zeros(len(variants), sum(sizes), device=device) for _ in range(2))
        self.leaves = []
        start = 0
        for (rows, columns), size in zip(shapes, sizes, strict=True):
            part = slice(start, start + size)
            leaf = self.values[:, part].view(-1, rows, columns).detach().requires_grad_()
            leaf.grad = self.gradients[:, part].view(-1, rows, columns)
            self.leaves.append(leaf)
            start += size
        self.scale, self.dropout = (
            torch.tensor(values, device=device)[:, None, None]
            for values in ([v.scale for v in variants], [v.dropout for v in variants])
        )
        self.dropping = False
        self._start(model, seed)

    def pair(self, name: str) -> tuple[Any, Any]:
        """A and B of a linear layer."""
        i = list(self.linears).index(name)
        return self.leaves[i], self.leaves[len(self.linears) + i]

    def _start(self, model: Any, seed: int) -> None:
        """A uniform as in nn.Linear and the same for all variants, B zero; or the quantization error's best rank r."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, linear in self.linears.items():
                a_VIR, b_VRO = self.pair(name)
                bound = 1 / math.sqrt(linear.in_features)
                drawn = torch.empty(self.rank, linear.in_features).uniform_(-bound, bound, generator=generator).T
                for v, variant in enumerate(self.variants):
                    if variant.targets == "qv" and name.rpartition(".")[2] not in ("q_proj", "v_proj"):
                        continue
                    a_VIR[v, :, : variant.r] = drawn[:, : variant.r].to(a_VIR)
                    error = getattr(linear, "quantization_error", None)
                    if variant.start == "error" and error is not None:  # LoftQ's first step (Li et al. 2023)
                        torch.manual_seed(0)
                        u, s, w = torch.svd_lowrank(error, q=variant.r + 8, niter=4)
                        root = s[: variant.r].sqrt() / math.sqrt(variant.scale)
                        a_VIR[v, :, : variant.r] = w[:, : variant.r] * root
                        b_VRO[v, : variant.r] = (u[:, : variant.r] * root).T

    def install(self) -> None:
        """Every linear layer adds its variants' products; `use` says to which numbers."""
        for name, linear in self.linears.items():
            a_VIR, b_VRO = self.pair(name)

            def forward(x: Any, linear: Any = linear, a: Any = a_VIR, b: Any = b_VRO) -> Any:
                import torch
                import torch.nn.functional as F

                y = F.linear(x, linear.weight, linear.bias)
                x_VTI = x.view(a.shape[0], -1, a.shape[1])
                if self.dropping:
                    kept = torch.rand(x_VTI.shape, device=x.device) >= self.dropout
                    x_VTI = x_VTI * (kept / (1 - self.dropout)).to(x.dtype)
                t = x_VTI @ a.to(x.dtype)
                return y + ((t * self.scale.to(x.dtype)) @ b.to(x.dtype)).view(y.shape)

            linear.forward = forward


class Adam:
    """AdamW without decay, with clipping at norm 1 and a rate of its own for each variant."""

    def __init__(self, adapters: Adapters) -> None:
        import torch

        self.adapters = adapters
        self.mean, self.square = torch.zeros_like(adapters.values), torch.zeros_like(adapters.values)
        self.average = adapters.values.clone()

    def step(self, number: int, steps: int) -> None:
        """Take step `number`, counted from 0."""
        import torch

        own, variants = self.adapters, self.adapters.variants
        rate = torch.tensor([[v.rate * v.factor(number, steps)] for v in variants], device=own.values.device)
        plus = torch.tensor([[v.loraplus] for v in variants], device=own.values.device)
        with torch.no_grad():
            gradients = own.gradients
            gradients.mul_((1 / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
            self.mean.lerp_(gradients, 0.1)
            self.square.mul_(0.999).addcmul_(gradients, gradients, value=0.001)
            update = self.mean / ((self.square / (1 - 0.999 ** (number + 1))).sqrt_().add_(1e-8))
            update.mul_(rate / (1 - 0.9 ** (number + 1)))
            update[:, own.a_numbers :].mul_(plus)
            own.values.sub_(update)
            gradients.zero_()
            # A short average at first, so that the start is forgotten.
            decay = min(EMA_DECAY, (2 + number) / (11 + number))
            self.average.lerp_(own.values, 1 - decay)


def rows_of(windows: list[Any], variants: int) -> Iterator[list[Any]]:
    """Groups of windows that make a row of ROW_TOKENS, all variants together."""
    row: list[Any] = []
    for window in sorted(windows, key=len, reverse=True):
        if row and variants * (sum(map(len, row)) + len(window)) > ROW_TOKENS:
            yield row
            row = []
        row.append(window)
    if row:
        yield row


def nats_of(model: Any, windows: list[Any], variants: int) -> Any:
    """Nats of each counted token, shape (variants, counted), differentiable; windows in the order given."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    device = model.model.embed_tokens.weight.device
    lengths = [len(w) for w in windows] * variants
    ids = np.tile(np.concatenate([w.input_ids for w in windows]), variants)
    positions = np.concatenate([np.arange(n) for n in lengths])
    following = [np.where(np.append(w.counted[1:], False), np.append(w.input_ids[1:], 0), -100) for w in windows]
    targets = torch.from_numpy(np.tile(np.concatenate(following), variants)).long()
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    hidden = model.model(
        input_ids=torch.from_numpy(ids).long()[None].to(device),
        position_ids=torch.from_numpy(positions).long()[None].to(device),
        use_cache=False,
        cu_seq_lens_q=borders.to(device),
        cu_seq_lens_k=borders.to(device),
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        segments=tuple(borders.tolist()),
    ).last_hidden_state[0]
    places = torch.nonzero(targets >= 0)[:, 0]
    hidden, targets = hidden[places.to(device)], targets[places].to(device)

    def loss(part: Any, wanted: Any) -> Any:
        return F.cross_entropy(F.linear(part, model.lm_head.weight).float(), wanted, reduction="none")

    parts = [
        checkpoint(loss, hidden[i : i + LOSS_ROWS], targets[i : i + LOSS_ROWS], use_reentrant=False)
        for i in range(0, len(targets), LOSS_ROWS)
    ]
    return torch.cat(parts).view(variants, -1)


def score(model: Any, windows: list[Any], variants: int) -> tuple[Any, Any]:
    """Nats (variants, documents) and counted tokens (documents,), documents in the order of their names."""
    import torch

    names = sorted({w.document for w in windows})
    place = {name: i for i, name in enumerate(names)}
    nats, tokens = np.zeros((variants, len(names))), np.zeros(len(names), dtype=int)
    with torch.no_grad():
        for row in rows_of(windows, variants):
            values = nats_of(model, row, variants).double().cpu().numpy()
            start = 0
            for window in row:
                count = int(window.counted.sum())
                nats[:, place[window.document]] += values[:, start : start + count].sum(axis=1)
                tokens[place[window.document]] += count
                start += count
    return nats, tokens


def train_group(model: Any, group: Group, texts: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """Train a group's variants together and measure them; None where the time is up."""
    import torch

    from drawplate.data.batches import step_indices, steps_per_epoch

    windows, heldout = texts[group.corpus]
    count, variants = len(windows), len(group.variants)
    batch = max(1, round(group.step_tokens * count / sum(map(len, windows))))
    an_epoch = steps_per_epoch(count, batch)
    steps = an_epoch * group.epochs
    measured = {name: held for name, (_, held) in texts.items() if name in (group.corpus, GENERAL)}
    for linear in (m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)):
        linear.__dict__.pop("forward", None)
    before = {name: score(model, held, 1) for name, held in measured.items()}
    adapters = Adapters(model, group.variants, group.seed)
    adapters.install()
    optimizer = Adam(adapters)
    epochs: list[dict[str, Any]] = []
    began = time.monotonic()
    for step in range(steps):
        chosen = [windows[i] for i in step_indices(step, count, batch, group.seed)]
        counted = sum(int(w.counted.sum()) for w in chosen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the gradients lie strided, so that a row is one variant's
            adapters.dropping = any(v.dropout for v in group.variants)
            for row in rows_of(chosen, variants):
                (nats_of(model, row, variants).sum() / counted).backward()
            adapters.dropping = False
        optimizer.step(step, steps)
        if (step + 1) % an_epoch == 0:
            last = step + 1 == steps
            epochs.append({n: score(model, h, variants)[0] for n, h in measured.items() if last or n == group.corpus})
        if time.monotonic() > deadline:
            return None
    adapters.values.copy_(optimizer.average)
    averaged = score(model, heldout, variants)[0]
    return {
        **dataclasses.asdict(group),
        "sequences_per_step": batch,
        "steps": steps,
        "train_tokens": sum(map(len, windows)),
        "train_windows": count,
        "seconds": round(time.monotonic() - began, 1),
        "before_nats": {name: float(nats.sum()) for name, (nats, _) in before.items()},
        "tokens": {name: int(tokens.sum()) for name, (_, tokens) in before.items()},
        "epoch_nats": [{n: rounded(nats.sum(axis=1)) for n, nats in point.items()} for point in epochs],
        "averaged_nats": rounded(averaged.sum(axis=1)),
        "document_tokens": before[group.corpus][1].tolist(),
        "document_nats_before": rounded(before[group.corpus][0][0]),
        "document_nats": [rounded(row) for row in epochs[-1][group.corpus]],
    }


def rounded(values: Any) -> list[float]:
    """To a thousandth of a nat."""
    return [round(float(value), 3) for value in values]


class Base:
    """The plain model on a device, whose decoder's weights can be given another precision."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from drawplate.model import attention

        attention.register()
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, attn_implementation=attention.NAME)
        self.model.to(device).requires_grad_(False).eval()
        self.linears = [m for m in self.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        self.plain = [linear.weight.detach().clone() for linear in self.linears]
        self.precision = "plain"

    def in_precision(self, precision: str) -> Any:
        """The model with its linear layers as that precision stores them."""
        import torch

        from drawplate.model.frozen import Storage

        if precision == self.precision:
            return self.model
        storage, self.precision = Storage(precision, precision == "nf4"), precision
        with torch.no_grad():
            for linear, plain in zip(self.linears, self.plain, strict=True):
                shape = (plain.shape[0], plain.shape[1])
                kept = storage.encode(plain)
                stored = storage.decode([kept[k] for k in storage.specs(*shape)], shape, self.dtype)
                linear.weight.copy_(stored)
                linear.quantization_error = plain.float() - stored.float()
        return self.model


def load_texts(folder: Path, name: str, model_folder: Path, length: int) -> dict[str, Any]:
    """Training and held-out windows of a corpus, and of the general text, which is only measured."""
    from drawplate.data.documents import read_documents
    from drawplate.data.general import SHIPPED
    from drawplate.data.split import split
    from drawplate.data.tokens import load_tokenizer, tokenize
    from drawplate.recipe import DataSection

    tokenizer = load_tokenizer(model_folder)
    section = DataSection(files=[str(folder / f"{name}.jsonl")])
    sides = split(read_documents(section, section.files).documents, section)
    train = tokenize(sides.train, tokenizer, length, append_eos=True)
    general = read_documents(section, [str(SHIPPED)]).documents
    return {
        name: (list(train.sequences), list(tokenize(sides.heldout, tokenizer, length).sequences)),
        GENERAL: ((), list(tokenize(general, tokenizer, length).sequences)),
    }


def study(corpus: str, given: argparse.Namespace, model_folder: Path, began: float) -> None:
    """All groups of one corpus, in this process."""
    import torch

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {corpus}: {what}", flush=True)

    torch.set_num_threads(1)  # the processes are three, and other programs may run
    base = Base(model_folder, given.device)
    texts = load_texts(given.folder, corpus, model_folder, min(2048, base.model.config.max_position_embeddings))
    tell(f"ready, {len(texts[corpus][0])} training windows, {sum(map(len, texts[corpus][0]))} tokens")
    for number, group in list(enumerate(groups_of(corpus)))[given.skip :]:
        result = train_group(base.in_precision(group.precision), group, texts, began + given.seconds)
        if result is None:
            tell(f"group {number} was cut off: the time is up")
            return
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        best = min(result["epoch_nats"][-1][corpus]) / result["tokens"][corpus]
        tell(
            f"group {number}: {len(group.variants)} recipes, {result['steps']} steps, {result['seconds']} s, "
            f"best perplexity {math.exp(best):.2f}"
        )


# --- the table ---------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a recipe: percent change of perplexity on each corpus (mean over seeds) with a 95 % interval over
    documents for the first seed, the spread between seeds, and on general text; best first.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        shared = {key: line[key] for key in ("precision", "step_tokens", "epochs")}
        for v, variant in enumerate(line["variants"]):
            recipe = {**shared, "dropout": 0.0, **variant}
            row = found.setdefault(json.dumps(recipe, sort_keys=True), {"recipe": recipe, "runs": []})
            row["runs"].append((line, v))
    return sorted((_row(row["recipe"], row["runs"]) for row in found.values()), key=lambda row: row["mean_percent"])


def _row(recipe: dict[str, Any], runs: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": recipe, "corpora": {}}
    for corpus in CORPORA:
        own = [(line, v) for line, v in runs if line["corpus"] == corpus]
        if not own:
            continue
        change = [_log_ratio(line, line["epoch_nats"][-1][corpus][v], corpus) for line, v in own]
        first, v = own[0]
        row["corpora"][corpus] = {
            "percent": percent(statistics.fmean(change)),
            "interval_percent": _interval(first, v),
            "between_seeds": round(100 * statistics.stdev(change), 2) if len(change) > 1 else None,
            "seeds": len(change),
            "perplexity": round(math.exp(statistics.fmean(change) + _before(first, corpus)), 3),
            "averaged_percent": percent(
                statistics.fmean(_log_ratio(line, line["averaged_nats"][v], corpus) for line, v in own)
            ),
            "by_epoch_percent": [percent(_log_ratio(first, p[corpus][v], corpus)) for p in first["epoch_nats"]],
        }
    general = [_log_ratio(x, x["epoch_nats"][-1][GENERAL][v], GENERAL) for x, v in runs if GENERAL in x["tokens"]]
    row["general_percent"] = percent(statistics.fmean(general)) if general else None
    row["mean_percent"] = round(statistics.fmean(c["percent"] for c in row["corpora"].values()), 2)
    return row


def _before(line: dict[str, Any], name: str) -> float:
    return float(line["before_nats"][name] / line["tokens"][name])


def _log_ratio(line: dict[str, Any], nats: float, name: str) -> float:
    return float(nats / line["tokens"][name] - _before(line, name))


def percent(log_ratio: float) -> float:
    """Of perplexity."""
    return round(100 * math.expm1(log_ratio), 2)


def _interval(line: dict[str, Any], v: int) -> list[float]:
    """Percentiles of a paired bootstrap over documents."""
    difference = np.array(line["document_nats"][v]) - np.array(line["document_nats_before"])
    tokens = np.array(line["document_tokens"])
    draws = np.random.default_rng(0).integers(0, len(tokens), (2000, len(tokens)))
    ratios = difference[draws].sum(axis=1) / tokens[draws].sum(axis=1)
    return [percent(x) for x in np.percentile(ratios, [2.5, 97.5])]


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["corpora", "run", "table"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--skip", type=int, default=0, help="groups that an earlier run has done")
    parser.add_argument("--model", help="a model's folder, instead of the demo's")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.what == "corpora":
        write_corpora(given.folder)
        return
    if given.what == "table":
        lines = [json.loads(line) for line in given.folder.read_text().splitlines()]
        given.out.write_text(json.dumps({"table": table(lines), "groups": lines}, indent=1) + "\n")
        return
    began = time.monotonic()
    from drawplate.model.weights import open_checkpoint
    from drawplate.recipe import ModelSection

    model = ModelSection(name_or_path=given.model) if given.model else ModelSection(**MODEL)  # type: ignore[arg-type]
    folder = open_checkpoint(model).folder  # a GGUF is converted here, once
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=study, args=(corpus, given, folder, began)) for corpus in CORPORA]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(1.0, began + given.seconds + 15 - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    print(f"{time.monotonic() - began:6.1f} s  done", flush=True)


if __name__ == "__main__":
    main()
