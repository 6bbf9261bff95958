"""Kills training at random moments and compares what goes on with what was: on random weights of a real shape.

    python bench/kills.py OUT.json [--kills 10] [--shape 3b] [--layers N] [--device cuda|cpu] [--tokens 4096]

One process trains; at a random moment (in a forward, a backward, the optimizer, or a write of a checkpoint) it is sent
SIGKILL, at least one optimizer step after its newest checkpoint. The next process restores that checkpoint. The oracle:
the first step after a checkpoint was taken twice, by the process that had not stopped and by one that restored. Order
of data, learning rate and dropout keys of the two must be the same bytes, the restored adapter and moments those of the
manifest, and the two losses equal to 1e-6. Measured beside: what resuming needs of the device at its highest, and how
long a checkpoint takes.

All processes are started at once and wait for their turn, because importing takes longer than the rest; none is
forked, since some libraries touch the device when they are imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

from bench.about import about  # noqa: E402
from bench.random_models import random_model, random_sequences  # noqa: E402
from drawplate.checkpoint.snapshot import OPTIMIZER_NAME, restore, snapshot_files  # noqa: E402
from drawplate.checkpoint.write import MANIFEST_NAME, Position, good, keep_only, write_checkpoint  # noqa: E402
from drawplate.data.batches import Cutting  # noqa: E402
from drawplate.errors import StoppedSafely  # noqa: E402
from drawplate.model.base.adapter_config import WEIGHTS_NAME  # noqa: E402
from drawplate.model.base.precision import Storage  # noqa: E402
from drawplate.model.causal_lm import CausalLM  # noqa: E402
from drawplate.model.placement import Placement  # noqa: E402
from drawplate.recipe import TrainSection  # noqa: E402
from drawplate.train.loop import make_optimizer, train  # noqa: E402
from drawplate.train.task import Schedule, TrainState, TrainTask  # noqa: E402

MOMENTS = {"forward": (1, 2, 5, 6), "backward": (1, 2, 5, 6), "optimizer": (1, 3), "write": (1, 2, 3)}
"""Where to kill, and at which occasions: none lies between a checkpoint and the end of the step after it, since that
step is the one that both processes take."""
SAVE_STEPS = 2
MICRO_BATCHES = 2
EVERY_SECONDS = 300
WRITE = os.write  # the log's own, which no kill counts


def load(options: argparse.Namespace) -> CausalLM:
    """The shape with random weights, the same in every process, and an adapter on all linear layers."""
    cuda = options.device == "cuda"
    placement = Placement(
        device=torch.device("cuda", 0) if cuda else torch.device("cpu"),
        storage=Storage("bf16" if cuda else "fp32"),
        compute_dtype=torch.bfloat16 if cuda else torch.float32,
        activations="recompute",
    )
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1}
    return random_model(options.shape, placement, lora, layers=options.layers)


def task_of(model: CausalLM, options: argparse.Namespace) -> TrainTask:
    """Sixty-four windows of random tokens; each micro-batch is four of them, packed."""
    windows = random_sequences([options.tokens // 4] * 64, model.anatomy.config.vocab_size)
    return TrainTask(
        model=model,
        sequences=windows,
        cutting=Cutting(packing=True, tokens=options.tokens),
        effective_batch=4 * MICRO_BATCHES,
        schedule=Schedule(steps=10_000, peak_rate=2e-4, kind="cosine", warmup_ratio=0.05),
        section=TrainSection(),
    )


class Keeper:
    """Checkpoints every SAVE_STEPS steps."""

    def __init__(self, folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer, note: Any) -> None:
        self.folder, self.model, self.optimizer, self.note = folder, model, optimizer, note
        self.newest: Position | None = None

    def due(self, state: TrainState) -> bool:
        """By steps."""
        position = Position(state.step, state.micro_batches)
        return state.micro_batches == 0 and state.step % SAVE_STEPS == 0 and position != self.newest

    def save(self, state: TrainState) -> None:
        """Write, verify, prune, and note how long it took."""
        began = time.monotonic()
        files = snapshot_files(self.model.adapter, self.optimizer, state, {})
        self.newest = Position(state.step)
        written = write_checkpoint(self.folder, self.newest, files)
        keep_only(self.folder, [written, *good(self.folder, 2)][:3])
        size = sum(path.stat().st_size for path in written.iterdir())
        self.note({"event": "checkpoint", "step": state.step, "seconds": time.monotonic() - began, "bytes": size})

    def rewind(self, state: TrainState) -> bool:
        """Never."""
        return False

    def stopped(self, why: str) -> StoppedSafely:
        """Never asked here."""
        return StoppedSafely(why, next_step="")

    def where(self) -> str:
        """Of no interest here."""
        return ""


class Listener:
    """Notes what each step saw, and kills the process at the chosen moment."""

    def __init__(self, model: CausalLM, note: Any) -> None:
        self.model, self.note = model, note
        self.batches, self.dropout = hashlib.sha256(), hashlib.sha256()

    def on_micro_batch(self, step: int, done: int, total: int, batch: Any) -> None:
        """What the micro-batch held, and the dropout keys that the layers were given."""
        self.batches.update(batch.input_ids_BT.numpy().tobytes() + batch.sequence_ids_BT.numpy().tobytes())
        keys = self.model.runner._keys
        assert keys, "dropout is on"
        self.dropout.update(torch.cat([key.flatten() for key in keys]).cpu().numpy().tobytes())

    def on_step(self, record: Any, progress: float) -> None:
        """One line."""
        seen = {"order": self.batches.hexdigest(), "dropout": self.dropout.hexdigest()}
        self.batches, self.dropout = hashlib.sha256(), hashlib.sha256()
        figures = {"step": record.step, "loss": record.loss, "rate": record.learning_rate, "seconds": record.seconds}
        self.note({"event": "step", **figures, **seen})

    def on_evaluation(self, *_: Any) -> None:
        """Nothing is evaluated."""

    def on_warning(self, message: str) -> None:
        """Noted."""
        self.note({"event": "warning", "message": message})


def arm(moment: str, countdown: int, model: CausalLM, optimizer: torch.optim.Optimizer) -> None:
    """SIGKILL at the `countdown`th occasion of a kind from now on."""
    left = [countdown]

    def tick(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment == "forward":
        real = model.sum_nats
        model.sum_nats = lambda *a, **k: (tick(), real(*a, **k))[1]  # type: ignore[method-assign]
    elif moment == "backward":
        model.adapter.parameters()[len(model.adapter.parameters()) // 2].register_hook(tick)
    elif moment == "optimizer":
        optimizer.register_step_post_hook(tick)
    else:
        os.write = lambda *a: (tick(), WRITE(*a))[1]  # type: ignore[assignment]


def child(options: argparse.Namespace, folder: Path, log: Path, number: int) -> None:
    """Restore the newest checkpoint, go on, and die; or end well, if no kill is left."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def note(values: dict[str, Any]) -> None:
        WRITE(descriptor, (json.dumps({"process": number, **values}) + "\n").encode())

    began = time.monotonic()
    model = load(options)
    cuda = options.device == "cuda"
    loaded_bytes = torch.cuda.max_memory_reserved() if cuda else 0
    optimizer = make_optimizer(model.adapter.parameters(), TrainSection())
    keeper = Keeper(folder, model, optimizer, note)
    found = good(folder, 1)
    state = restore(found[0], model, optimizer) if found else TrainState()
    restored = {"from": found[0].name, **_equal_bytes(found[0], model, optimizer, state)} if found else {}
    keeper.newest = Position(state.step) if found else None
    peak = torch.cuda.max_memory_reserved() if cuda else 0
    loading = {"load_seconds": time.monotonic() - began, "loaded_bytes": loaded_bytes, "restored_bytes": peak}
    note({"event": "start", "step": state.step, **loading, **restored})
    task = replace(task_of(model, options), optimizer=optimizer, keeper=keeper)
    listener = Listener(model, note)
    train(replace(task, until=(state.step + SAVE_STEPS, 0), keeper=None), listener, state)  # unhurt to a checkpoint
    keeper.save(state)
    train(replace(task, until=(state.step + 1, 0), keeper=None), listener, state)  # the step that is taken twice
    note({"event": "peak", "bytes": torch.cuda.max_memory_reserved() if cuda else 0})
    if number < options.kills:
        moment = list(MOMENTS)[number % len(MOMENTS)]
        arm(moment, random.Random(number).choice(MOMENTS[moment]), model, optimizer)
        note({"event": "armed", "moment": moment})
        train(task, listener, state)
        raise AssertionError("still alive")


def _equal_bytes(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer, state: TrainState) -> dict[str, bool]:
    """Whether what is restored, read back from the device, has the bytes of the checkpoint."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    files = snapshot_files(model.adapter, optimizer, state, {})
    equal = {}
    for key, name in (("adapter_equal", WEIGHTS_NAME), ("optimizer_equal", OPTIMIZER_NAME)):
        digest = hashlib.sha256()
        for piece in files[name]:
            digest.update(piece)
        equal[key] = digest.hexdigest() == manifest[name]["sha256"]
    return equal


def judge(lines: list[dict[str, Any]], kills: int) -> dict[str, Any]:
    """Compare, for every restored checkpoint, the first step after it in the process before and in the one after."""
    pairs = []
    for start in [x for x in lines if x["event"] == "start" and "from" in x]:
        step, number = start["step"] + 1, start["process"]
        taken = {x["process"]: x for x in lines if x["event"] == "step" and x["step"] == step}
        before, after = taken[max(p for p in taken if p < number)], taken[number]
        pairs.append(
            {
                "step": step,
                "order_equal": before["order"] == after["order"],
                "rate_equal": before["rate"] == after["rate"],
                "dropout_equal": before["dropout"] == after["dropout"],
                "adapter_equal": start["adapter_equal"],
                "optimizer_equal": start["optimizer_equal"],
                "loss_difference": abs(before["loss"] - after["loss"]),
                "loss_relative_difference": abs(before["loss"] - after["loss"]) / before["loss"],
            }
        )
    saves = [x for x in lines if x["event"] == "checkpoint"]
    seconds = sorted(x["seconds"] for x in saves)
    restored = [x["restored_bytes"] for x in lines if x["event"] == "start" and "from" in x]
    return {
        "kills": kills,
        "moments": [x["moment"] for x in lines if x["event"] == "armed"],
        "pairs": pairs,
        "all_equal": all(all(v for k, v in pair.items() if k.endswith("_equal")) for pair in pairs),
        "largest_loss_relative_difference": max(pair["loss_relative_difference"] for pair in pairs),
        "checkpoints": len(saves),
        "checkpoint_bytes": saves[-1]["bytes"],
        "checkpoint_seconds": seconds,
        "checkpoint_share_at_5_minutes": seconds[len(seconds) // 2] / EVERY_SECONDS,
        "step_seconds": [x["seconds"] for x in lines if x["event"] == "step"],
        "resume_peak_bytes": max(restored, default=0),
        "running_peak_bytes": max(x["bytes"] for x in lines if x["event"] == "peak"),
        "load_seconds": [x["load_seconds"] for x in lines if x["event"] == "start"],
    }


def main() -> None:
    """Let each process have its turn, then judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--process", type=int, help="used by this program to start itself")
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / f"drawplate-{options.out.stem}"
    log = options.out.with_suffix(".jsonl")
    if options.process is not None:
        sys.stdin.readline()
        child(options, folder, log, options.process)
        return
    log.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    processes = [
        subprocess.Popen([sys.executable, *sys.argv, "--process", str(number)], stdin=subprocess.PIPE, text=True)
        for number in range(options.kills + 1)
    ]
    died = 0
    for number, process in enumerate(processes):
        process.communicate("go\n")
        died += process.returncode == -signal.SIGKILL
        if process.returncode > 0:
            for waiting in processes[number + 1 :]:
                waiting.kill()
            raise SystemExit(f"process {number} failed")
        if number:  # after every one, so that a bench that is cut short keeps what it had
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            result = judge(lines, died)
            options.out.write_text(json.dumps({**about(), **result}, indent=1) + "\n")
    shutil.rmtree(folder)
    lists = ("pairs", "moments", "step_seconds", "load_seconds")
    print({key: value for key, value in result.items() if key not in lists})


if __name__ == "__main__":
    main()
