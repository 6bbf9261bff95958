"""Which recipe learns best: rate, batch, rank, targets and the rest, on one small model and corpora of several kinds.

    python bench/recipe_study.py corpora FOLDER          # here: climate articles, Python functions, manual pages
    python bench/recipe_study.py run FOLDER OUT.jsonl [--seconds 200] [--skip N] [--model FOLDER] [--device cpu]
    python bench/recipe_study.py table OUT.json LINES.jsonl...

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

An adapter may start from the quantization error, W - Q(W): `error` is its best approximation of the adapter's rank
(LoftQ's first step, Li et al. 2023), `weighted` the best for the layer's own inputs, each weighed by its root mean
square over training text (QERA's approximate form, Zhang et al. 2024), and `even` is the same product with A's rows
as long as a plain start has them, so that the rate means the same. Such a run, and every other in 4 bits, is
measured on the unquantized weights too, with the difference to its start added to them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import gc
import gzip
import importlib
import json
import math
import multiprocessing
import os
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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

CORPORA = ("climate", "code", "manual")
GENERAL = "general"
EMA_DECAY = 0.98
ROW_TOKENS = 20_480
CALIBRATION_TOKENS = 16_384
LOSS_ROWS = 4096
PLAIN_PRECISION = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
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
    """What may differ within a group. `rate` is the A matrices'; `start` is zero, error, weighted or even."""

    rate: float = 7e-4
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
        from drawplate.train.task import Schedule

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


BASE = Variant()
WEIGHTED = replace(BASE, start="weighted")
EVEN = replace(BASE, start="even")
SEEDED = (
    BASE,
    *(replace(BASE, r=r) for r in (32, 64)),
    *(replace(BASE, start="error", r=r) for r in (16, 64)),
    *(replace(WEIGHTED, r=r) for r in (16, 32, 64)),
)
STARTS = (
    *(replace(WEIGHTED, rate=rate) for rate in (3.5e-4, 5e-4)),
    *(replace(WEIGHTED, dropout=0.1, rate=rate) for rate in (5e-4, 7e-4)),
    *(replace(WEIGHTED, dropout=0.2, rate=rate) for rate in (7e-4, 1e-3)),
    *(replace(EVEN, dropout=dropout) for dropout in (0.0, 0.1)),
)
DROPPED_16_BIT = (
    *(replace(BASE, dropout=dropout) for dropout in (0.1, 0.2)),
    replace(BASE, dropout=0.2, rate=1e-3),
)
SHAPES = (
    replace(WEIGHTED, schedule="linear"),
    replace(WEIGHTED, schedule="constant"),
    replace(WEIGHTED, schedule="constant then decay"),
    replace(WEIGHTED, warmup=0.0),
    replace(WEIGHTED, warmup=0.1),
    replace(WEIGHTED, r=8),
    replace(WEIGHTED, r=32, rate=3.5e-4),
    replace(WEIGHTED, r=64, rate=2.5e-4),
)
SHORTER = (
    *(replace(WEIGHTED, rate=rate) for rate in (5e-4, 7e-4, 1e-3)),
    replace(WEIGHTED, dropout=0.1),
    EVEN,
    replace(BASE, rate=1e-3),
)
TWO_PASSES = (
    *(replace(WEIGHTED, rate=rate) for rate in (1e-3, 1.4e-3)),
    *(replace(WEIGHTED, r=32, rate=rate) for rate in (5e-4, 7e-4, 1e-3)),
    *(replace(WEIGHTED, r=64, rate=rate) for rate in (2.5e-4, 3.5e-4, 5e-4)),
)
LOWER = (
    *(replace(WEIGHTED, r=64, rate=rate) for rate in (1e-4, 1.5e-4)),
    replace(WEIGHTED, r=64, rate=2.5e-4, dropout=0.2),
    *(replace(WEIGHTED, r=32, rate=rate) for rate in (2e-4, 2.5e-4)),
    replace(WEIGHTED, r=32, rate=3.5e-4, dropout=0.2),
    replace(EVEN, rate=5e-4),
    replace(EVEN, r=32, rate=3.5e-4),
)


def rates(of: Variant, *chosen: float) -> tuple[Variant, ...]:
    """One recipe at several rates."""
    return tuple(replace(of, rate=rate) for rate in chosen)


def groups_of(corpus: str) -> list[Group]:
    """In the order of what they decide. An earlier set (targets, LoRA+, rates from 2e-4 to 4e-3) is in the results."""
    nf4 = Group(corpus=corpus, variants=SEEDED)
    bf16 = Group(corpus=corpus, variants=rates(BASE, 5e-4, 7e-4, 1e-3), precision="bf16")
    wide = tuple(replace(BASE, r=32, rate=rate) for rate in (5e-4, 7e-4))
    return [
        nf4,
        bf16,
        replace(nf4, seed=1),
        replace(nf4, variants=STARTS),
        replace(nf4, variants=SHAPES),
        replace(bf16, variants=DROPPED_16_BIT),
        replace(nf4, variants=SHORTER, epochs=2),
        replace(nf4, variants=TWO_PASSES, epochs=2),
        replace(bf16, variants=(*rates(BASE, 7e-4, 1e-3, 1.4e-3), *wide), epochs=2),
        replace(nf4, variants=TWO_PASSES, epochs=2, seed=1),
        replace(nf4, variants=LOWER),
        replace(nf4, variants=rates(WEIGHTED, 5e-4, 7e-4, 1e-3), step_tokens=1024, epochs=2),
        replace(nf4, variants=rates(WEIGHTED, 1e-3, 1.4e-3, 2e-3), step_tokens=4096, epochs=2),
        replace(nf4, variants=TWO_PASSES, epochs=2, seed=2),
        replace(bf16, variants=(*rates(BASE, 7e-4, 1e-3, 1.4e-3), *wide), epochs=2, seed=1),
        replace(nf4, variants=STARTS, seed=1),
        replace(nf4, seed=2),
        replace(bf16, seed=1),
        replace(nf4, variants=rates(WEIGHTED, 7e-4, 1.4e-3, 2e-3), step_tokens=8192),
    ]


# --- training V adapters at once ---------------------------------------------------------------------------------


class Adapters:
    """V adapters of every linear layer of the decoder, all numbers of one adapter in one row of a matrix.

    Shapes: V variants, I inputs, O outputs, R the largest rank. All A matrices (V, I, R) come first, then all B
    matrices (V, R, O).
    """

    def __init__(self, base: Base, group: Group) -> None:
        import torch

        variants = group.variants
        self.variants, self.rank, self.linears = variants, max(v.r for v in variants), base.linears
        shapes = [(m.in_features, self.rank) for m in self.linears.values()]
        shapes += [(self.rank, m.out_features) for m in self.linears.values()]
        self.sizes, self.count = [rows * columns for rows, columns in shapes], len(self.linears)
        self.a_numbers = sum(self.sizes[: self.count])
        device = base.model.model.embed_tokens.weight.device
        self.values, self.gradients = (torch.zeros(len(variants), sum(self.sizes), device=device) for _ in range(2))
        self.leaves = []
        for part in (slice(0, self.a_numbers), slice(self.a_numbers, None)):
            leaf = self.values[:, part].detach().requires_grad_()
            leaf.grad = self.gradients[:, part]
            self.leaves.append(leaf)
        self.scale, self.dropout = (
            torch.tensor(values, device=device)[:, None, None]
            for values in ([v.scale for v in variants], [v.dropout for v in variants])
        )
        self.dropping = False
        self.current: dict[str, tuple[Any, Any]] = {}
        self._start(base, group.seed)
        self.start = self.values.clone()

    def pairs(self, a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
        """Linear layer -> its A (V, I, R) and B (V, R, O), views of all A's numbers and all B's."""
        parts_a, parts_b = (
            x.split(s, dim=1) for x, s in ((a, self.sizes[: self.count]), (b, self.sizes[self.count :]))
        )
        return {
            name: (one.view(-1, linear.in_features, self.rank), other.view(-1, self.rank, linear.out_features))
            for (name, linear), one, other in zip(self.linears.items(), parts_a, parts_b, strict=True)
        }

    def refresh(self, dtype: Any) -> None:
        """What the layers are to multiply with, B scaled: cast once a row, not once a layer."""
        a, b = self.leaves
        self.current = self.pairs(a.to(dtype), (b * self.scale[:, 0]).to(dtype))

    def difference(self, v: int) -> dict[str, Any]:
        """Linear layer -> what variant `v` has added to its weight since its start, (O, I)."""
        added = {}
        for values, sign in ((self.values, 1.0), (self.start, -1.0)):
            row = values[v : v + 1]
            for name, (a, b) in self.pairs(row[:, : self.a_numbers], row[:, self.a_numbers :]).items():
                added[name] = added.get(name, 0.0) + sign * self.variants[v].scale * (a[0] @ b[0]).T
        return added

    def _start(self, base: Base, seed: int) -> None:
        """A uniform as in nn.Linear and the same for all variants, B zero; or the quantization error's best rank r."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            pairs = self.pairs(self.values[:, : self.a_numbers], self.values[:, self.a_numbers :])
            for name, (a_VIR, b_VRO) in pairs.items():
                inputs = a_VIR.shape[1]
                bound = 1 / math.sqrt(inputs)
                drawn = torch.empty(self.rank, inputs).uniform_(-bound, bound, generator=generator).T
                for v, variant in enumerate(self.variants):
                    if variant.targets == "qv" and name.rpartition(".")[2] not in ("q_proj", "v_proj"):
                        continue
                    a_VIR[v, :, : variant.r] = drawn[:, : variant.r].to(a_VIR)
                    if variant.start != "zero":
                        left, right = base.error_factors(variant.start)[name]
                        rank = min(variant.r, left.shape[1])
                        part = right[:, :rank] / math.sqrt(variant.scale)
                        longer = part.norm(dim=0) * math.sqrt(3) if variant.start == "even" else 1.0
                        a_VIR[v, :, :rank] = part / longer
                        b_VRO[v, :rank] = (left[:, :rank] / math.sqrt(variant.scale) * longer).T

    def install(self) -> None:
        """Every linear layer adds its variants' products."""
        for name, linear in self.linears.items():

            def forward(x: Any, name: str = name, linear: Any = linear) -> Any:
                import torch
                import torch.nn.functional as F

                a_VIR, b_VRO = self.current[name]
                y = F.linear(x, linear.weight, linear.bias)
                x_VTI = x.view(a_VIR.shape[0], -1, a_VIR.shape[1])
                if self.dropping:
                    kept = torch.rand(x_VTI.shape, device=x.device) >= self.dropout
                    x_VTI = x_VTI * (kept / (1 - self.dropout)).to(x.dtype)
                y_VTO = y.view(a_VIR.shape[0], -1, y.shape[-1])
                return torch.baddbmm(y_VTO, x_VTI @ a_VIR, b_VRO).view(y.shape)

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


def nats_of(model: Any, windows: list[Any], adapters: Adapters | None) -> Any:
    """Nats of each counted token, shape (variants, counted), differentiable; windows in the order given."""
    import torch
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint

    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    variants = len(adapters.variants) if adapters else 1
    if adapters:
        adapters.refresh(dtype)
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


def score(model: Any, windows: list[Any], adapters: Adapters | None = None) -> tuple[Any, Any]:
    """Nats (variants, documents) and counted tokens (documents,), documents in the order of their names."""
    import torch

    variants = len(adapters.variants) if adapters else 1
    names = sorted({w.document for w in windows})
    place = {name: i for i, name in enumerate(names)}
    nats, tokens = np.zeros((variants, len(names))), np.zeros(len(names), dtype=int)
    with torch.no_grad():
        for row in rows_of(windows, variants):
            values = nats_of(model, row, adapters).double().cpu().numpy()
            start = 0
            for window in row:
                count = int(window.counted.sum())
                nats[:, place[window.document]] += values[:, start : start + count].sum(axis=1)
                tokens[place[window.document]] += count
                start += count
    return nats, tokens


def train_group(base: Base, group: Group, texts: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """Train a group's variants together and measure them; None where the time is up."""
    from drawplate.data.steps import StepOrder, target_tokens_of

    windows, heldout = texts[group.corpus]
    count, model = len(windows), base.in_precision(group.precision)
    batch = max(1, round(group.step_tokens * count / sum(map(len, windows))))
    order = StepOrder(target_tokens=target_tokens_of(windows), effective_batch=batch, seed=group.seed)
    an_epoch = order.steps_per_epoch
    steps = an_epoch * group.epochs
    measured = {name: held for name, (_, held) in texts.items() if name in (group.corpus, GENERAL)}
    before = {name: score(model, held) for name, held in measured.items()}
    if any(v.start in ("weighted", "even") for v in group.variants):
        base.watch_inputs(windows)
    adapters = Adapters(base, group)
    adapters.install()
    optimizer = Adam(adapters)
    epochs: list[dict[str, Any]] = [{group.corpus: score(model, heldout, adapters)[0]}]
    began = time.monotonic()
    for step in range(steps):
        take_step(model, adapters, [windows[i] for i in order.indices(step)])
        optimizer.step(step, steps)
        if (step + 1) % an_epoch == 0:
            last = step + 1 == steps
            epochs.append({n: score(model, h, adapters)[0] for n, h in measured.items() if last or n == group.corpus})
        if time.monotonic() > deadline:
            return None
    last_values = adapters.values.clone()
    adapters.values.copy_(optimizer.average)
    averaged = score(model, heldout, adapters)[0]
    adapters.values.copy_(last_values)
    plain = base.score_plain(adapters, heldout) if group.precision == "nf4" else None
    started, *epochs = epochs
    return {
        **dataclasses.asdict(group),
        "sequences_per_step": batch,
        "steps": steps,
        "train_tokens": sum(map(len, windows)),
        "train_windows": count,
        "seconds": round(time.monotonic() - began, 1),
        "before_nats": {name: float(nats.sum()) for name, (nats, _) in before.items()},
        "tokens": {name: int(tokens.sum()) for name, (_, tokens) in before.items()},
        "start_nats": rounded(started[group.corpus].sum(axis=1)),
        "epoch_nats": [{n: rounded(nats.sum(axis=1)) for n, nats in point.items()} for point in epochs],
        "averaged_nats": rounded(averaged.sum(axis=1)),
        "on_unquantized_nats": plain and rounded(plain),
        "document_tokens": before[group.corpus][1].tolist(),
        "document_nats_before": rounded(before[group.corpus][0][0]),
        "document_nats": [rounded(row) for row in epochs[-1][group.corpus]],
    }


def take_step(model: Any, adapters: Adapters, chosen: list[Any]) -> None:
    """Gradients of a step's windows."""
    counted = sum(int(w.counted.sum()) for w in chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the gradients lie strided, so that a row is one variant's
        adapters.dropping = any(v.dropout for v in adapters.variants)
        for row in rows_of(chosen, len(adapters.variants)):
            (nats_of(model, row, adapters).sum() / counted).backward()
        adapters.dropping = False


def rounded(values: Any) -> list[float]:
    """To a thousandth of a nat."""
    return [round(float(value), 3) for value in values]


class Base:
    """The plain model on a device, whose decoder's weights can be given another precision."""

    def __init__(self, folder: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from drawplate.model.layer import attention

        attention.register()
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, attn_implementation=attention.NAME)
        self.model.to(device).requires_grad_(False).eval()
        for norm in self.model.modules():
            if hasattr(norm, "variance_epsilon"):
                norm.forward = partial(_normed, norm)
        named = self.model.model.layers.named_modules()
        self.linears = {name: m for name, m in named if isinstance(m, torch.nn.Linear)}
        self.plain = {name: linear.weight.detach().clone() for name, linear in self.linears.items()}
        self.precision = "plain"
        self.input_rms: dict[str, Any] = {}
        self.factors: dict[str, dict[str, tuple[Any, Any]]] = {}

    def in_precision(self, precision: str) -> Any:
        """The model with its linear layers as that precision stores them, and no adapters."""
        import torch

        from drawplate.model.base.precision import Storage

        for linear in self.linears.values():
            linear.__dict__.pop("forward", None)
        if precision == self.precision:
            return self.model
        storage, self.precision = Storage(precision, precision == "nf4"), precision
        with torch.no_grad():
            for name, plain in self.plain.items():
                shape = (plain.shape[0], plain.shape[1])
                kept = storage.encode(plain)
                stored = storage.decode([kept[k] for k in storage.specs(*shape)], shape, self.dtype)
                self.linears[name].weight.copy_(stored)
        return self.model

    def watch_inputs(self, windows: list[Any]) -> None:
        """Root mean square of each linear layer's inputs over the first training windows, the model as it is."""
        import torch

        squares: dict[str, Any] = {}

        def watch(name: str) -> Any:
            return lambda _, given: squares.update({name: given[0].float().flatten(0, -2).square().mean(0)})

        hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in self.linears.items()]
        chosen = list(takewhile_tokens(windows, min(CALIBRATION_TOKENS, ROW_TOKENS)))
        with torch.no_grad():
            nats_of(self.model, chosen, None)
        for hook in hooks:
            hook.remove()
        self.input_rms = {name: mean.sqrt() for name, mean in squares.items()}

    def error_factors(self, start: str) -> dict[str, tuple[Any, Any]]:
        """Linear layer -> (left (O, K), right (I, K)), whose product is the quantization error, most of it first."""
        import torch

        if start not in self.factors:
            found = self.factors[start] = {}
            for kind in {name.rpartition(".")[2] for name in self.linears}:
                names = [name for name in self.linears if name.endswith(kind)]
                weights = [(self.plain[name].float(), self.linears[name].weight.float()) for name in names]
                error_LOI = torch.stack([plain - stored for plain, stored in weights])
                if start != "error":
                    rms_L1I = torch.stack([self.input_rms[name] for name in names])[:, None]
                    rms_L1I = rms_L1I.maximum(1e-3 * rms_L1I.amax(dim=2, keepdim=True))
                else:
                    rms_L1I = torch.ones_like(error_LOI[:, :1])
                left_LOK, right_LIK = balanced_factors(error_LOI * rms_L1I)
                found |= dict(zip(names, zip(left_LOK, right_LIK / rms_L1I.mT, strict=True), strict=True))
        return self.factors[start]

    def score_plain(self, adapters: Adapters, heldout: list[Any]) -> list[float]:
        """Held-out nats of each variant on the unquantized weights, with what it has added since its start."""
        import torch

        model, nats = self.in_precision(PLAIN_PRECISION[str(self.dtype)]), []
        for v in range(len(adapters.variants)):
            with torch.no_grad():
                for name, added in adapters.difference(v).items():
                    self.linears[name].weight.copy_(self.plain[name].float() + added)
            nats.append(float(score(model, heldout)[0].sum()))
        self.precision = "merged"
        return nats


def balanced_factors(matrix_LOI: Any) -> tuple[Any, Any]:
    """Singular vectors times the root of their singular values, (L, O, K) and (L, I, K), largest first."""
    import torch

    wide = matrix_LOI.shape[1] < matrix_LOI.shape[2]
    short_LSI = matrix_LOI if wide else matrix_LOI.mT
    _, vectors_LSK = torch.linalg.eigh(short_LSI @ short_LSI.mT)
    vectors_LSK = vectors_LSK.flip(2)
    others_LIK = short_LSI.mT @ vectors_LSK  # each a singular value long
    root_L1K = others_LIK.norm(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
    pair = vectors_LSK * root_L1K, others_LIK / root_L1K
    return pair if wide else pair[::-1]


def takewhile_tokens(windows: list[Any], tokens: int) -> Iterator[Any]:
    """The first windows that have so many tokens together; one at least."""
    total = 0
    for window in windows:
        total += len(window)
        if total > tokens and total > len(window):
            return
        yield window


def _normed(norm: Any, hidden: Any) -> Any:
    """An RMS norm in one kernel."""
    import torch.nn.functional as F

    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


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


def study(corpus: str, given: argparse.Namespace, model_folder: Any, began: float) -> None:
    """All groups of one corpus, in this process; `model_folder` is a connection that will tell the model's folder."""
    import torch

    for needed in ("transformers.models.llama.modeling_llama", "drawplate.data.split", "drawplate.train.loop"):
        importlib.import_module(needed)  # while the model is being converted

    def tell(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {corpus}: {what}", flush=True)

    torch.set_num_threads(1)  # the processes are three, and other programs may run
    folder = model_folder.recv()
    base = Base(folder, given.device)
    texts = load_texts(given.folder, corpus, folder, min(2048, base.model.config.max_position_embeddings))
    tell(f"ready, {len(texts[corpus][0])} training windows, {sum(map(len, texts[corpus][0]))} tokens")
    for number, group in list(enumerate(groups_of(corpus)))[given.skip :]:
        result = fitting(base, group, texts, began + given.seconds)
        if result is None:
            tell(f"group {number} was cut off: the time is up")
            return
        with given.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"about": about(given)}) + "\n")
        best = min(result["epoch_nats"][-1][corpus]) / result["tokens"][corpus]
        tell(
            f"group {number}: {len(group.variants)} recipes, {result['steps']} steps, {result['seconds']} s, "
            f"best perplexity {math.exp(best):.2f}"
        )


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Command, commit, machine and versions."""
    import torch
    import transformers

    return {
        "command": " ".join(["python", "bench/recipe_study.py", *sys.argv[1:]]),
        "commit": os.environ.get("DRAWPLATE_COMMIT", ""),
        "machine": torch.cuda.get_device_name() if given.device == "cuda" else given.device,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def fitting(base: Base, group: Group, texts: dict[str, Any], deadline: float) -> dict[str, Any] | None:
    """`train_group`, in smaller rows where the device has no room: others may use it."""
    global ROW_TOKENS
    import torch

    while True:
        try:
            return train_group(base, group, texts, deadline)
        except torch.OutOfMemoryError:
            if ROW_TOKENS < 5000:
                raise
        ROW_TOKENS //= 2
        gc.collect()
        torch.cuda.empty_cache()


# --- the table ---------------------------------------------------------------------------------------------------


def lifted(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Takes `about` out of the lines: one value where they agree, else each once, in order."""
    abouts = [line.pop("about") for line in lines]
    values = {key: [about[key] for about in abouts] for key in abouts[0]}
    once = {key: [each for i, each in enumerate(found) if each not in found[:i]] for key, found in values.items()}
    return {key: found[0] if len(found) == 1 else found for key, found in once.items()}


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
            "seeds": len({line["seed"] for line, _ in own}),
            "perplexity": round(math.exp(statistics.fmean(change) + _before(first, corpus)), 3),
            "averaged_percent": percent(
                statistics.fmean(_log_ratio(line, line["averaged_nats"][v], corpus) for line, v in own)
            ),
            "on_unquantized_perplexity": _on_unquantized(own, corpus),
            "by_epoch_percent": [percent(_log_ratio(first, p[corpus][v], corpus)) for p in first["epoch_nats"]],
        }
    general = [_log_ratio(x, x["epoch_nats"][-1][GENERAL][v], GENERAL) for x, v in runs if GENERAL in x["tokens"]]
    row["general_percent"] = percent(statistics.fmean(general)) if general else None
    row["mean_percent"] = round(statistics.fmean(c["percent"] for c in row["corpora"].values()), 2)
    return row


def _on_unquantized(own: list[tuple[dict[str, Any], int]], corpus: str) -> float | None:
    """Mean over seeds of the perplexity on unquantized weights; None where it was not measured."""
    losses = [x["on_unquantized_nats"][v] / x["tokens"][corpus] for x, v in own if x.get("on_unquantized_nats")]
    return round(math.exp(statistics.fmean(losses)), 3) if losses else None


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
    parser.add_argument("lines", type=Path, nargs="*", help="for `table`: what `run` wrote, in any number of files")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--skip", type=int, default=0, help="groups that an earlier run has done")
    parser.add_argument("--model", help="a model's folder, instead of the demo's")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.what == "corpora":
        write_corpora(given.folder)
        return
    if given.what == "table":
        lines = [json.loads(line) for path in (given.out, *given.lines) for line in path.read_text().splitlines()]
        record = {**lifted(lines), "table": table(lines), "groups": lines}
        given.folder.write_text(json.dumps(record, indent=1) + "\n")
        return
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    workers, tellers = [], []
    for corpus in CORPORA:
        heard, told = context.Pipe(duplex=False)
        workers.append(context.Process(target=study, args=(corpus, given, heard, began)))
        workers[-1].start()
        tellers.append(told)
    from drawplate.model.base.weights import open_checkpoint
    from drawplate.recipe import ModelSection

    model = ModelSection(name_or_path=given.model) if given.model else ModelSection(**MODEL)  # type: ignore[arg-type]
    folder = open_checkpoint(model).folder  # a GGUF is converted here, once
    for told in tellers:
        told.send(folder)
    for worker in workers:
        worker.join(max(1.0, began + given.seconds + 15 - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    print(f"{time.monotonic() - began:6.1f} s  done", flush=True)


if __name__ == "__main__":
    main()
