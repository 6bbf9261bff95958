"""One system in a process of its own: reads a command a line, answers a line of JSON.

    imports                   import the system's libraries
    load                      load the model
    curve CASE STEPS          steps with dropout 0, for the gate
    warm CASE                 compile and warm up; the first gradient is kept for the gate
    time CASE STEPS           some steps untimed, because memory was given back before, then STEPS timed
    quit

The driver (bench/compare.py) lets `load`, `curve` and `warm` of several processes overlap and runs `time` alone.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
UNTIMED_STEPS = 3
"""The first after memory was given back, and those in which Drawplate captures its graphs, one a shape of rows."""
MODULES = {
    "reference": "bench.peers.huggingface",
    "mission": "bench.peers.huggingface",
    "liger": "bench.peers.huggingface",
    "trl": "bench.peers.sft_trainer",
    "unsloth": "bench.peers.unsloth_model",
    "drawplate": "bench.peers.drawplate_model",
}


class Worker:
    """The loaded system and its measurements."""

    def __init__(self, job: dict[str, Any]) -> None:
        from bench.peers.cases import Setting

        self.setting, self.folder, self.out = Setting(**job["setting"]), Path(job["folder"]), Path(job["out"])
        self.peer: Any = None
        self.first_step_seconds: float | None = None
        self.decided: dict[str, dict[str, Any]] = {}  # by case
        self.busy_seconds = 0.0  # importing and loading, without waiting for the driver

    def imports(self) -> dict[str, Any]:
        """Import what the system needs; Unsloth wants to be the first."""
        self.module = importlib.import_module(MODULES[self.setting.system])
        self.busy_seconds = time.monotonic() - BEGAN
        return {"import_seconds": round(self.busy_seconds, 2)}

    def load(self) -> dict[str, Any]:
        """Load; the budget holds from here on, so that loading must fit too."""
        import torch

        from bench.peers import material
        from bench.peers.cases import CORPUS

        began = time.monotonic()
        if torch.cuda.is_available():
            self._cap()
            torch.cuda.reset_peak_memory_stats()
        self.peer = self.module.load(self.folder, self.setting)
        self.start = material.load_start(self.folder)
        corpus = self.folder / CORPUS
        self.corpus = json.loads(corpus.read_text()) if corpus.is_file() else []
        self.vocab = json.loads((self.folder / "config.json").read_text())["vocab_size"]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.busy_seconds += time.monotonic() - began
        return {
            "load_seconds": round(time.monotonic() - began, 2),
            "load_peak_reserved_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        }

    def curve(self, case: str, steps: str) -> dict[str, Any]:
        """Losses and gradient norms without dropout."""
        return self._steps(case, int(steps), dropout=0.0, kept_gradient="curve")

    def warm(self, case: str) -> dict[str, Any]:
        """The first step's loss and gradient, then more steps; memory is given back afterwards."""
        steps = 1 if self.setting.system == "reference" else 3
        return self._steps(case, steps, dropout=self.setting.dropout, kept_gradient=case)

    def time(self, case: str, steps: str) -> dict[str, Any]:
        """Seconds of steps on their own."""
        answer = self._steps(case, int(steps) + UNTIMED_STEPS, dropout=self.setting.dropout)
        answer["step_seconds"] = answer["step_seconds"][-int(steps) :]
        return answer

    def _steps(self, name: str, count: int, *, dropout: float, kept_gradient: str = "") -> dict[str, Any]:
        import torch

        from bench.peers.cases import documents, parse_case
        from bench.peers.memory import process_device_bytes
        from bench.peers.stepping import set_adapter, take_steps

        case, cuda, began = parse_case(name), torch.cuda.is_available(), time.monotonic()
        steps = [documents(case, step, self.vocab, self.corpus) for step in range(count)]
        if hasattr(self.peer, "enter"):
            self.peer.enter(case)
        if kept_gradient and hasattr(self.peer, "prepare") and name not in self.decided:
            self._prepare(case)
        elif self.setting.options.get("keep") == "fit":
            self.peer.keep(self.decided[name]["decided"]["kept_layers"])  # another case may have come between
        room = self._cap()
        gradient = self.out / f"gradient-{kept_gradient}.safetensors" if kept_gradient else None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        set_adapter(self.peer, self.start)
        take = getattr(self.peer, "take_steps", None) or (lambda *a, **k: take_steps(self.peer, *a, **k))
        if self.first_step_seconds is None and self.setting.system != "reference":
            take(steps[:1], dropout=dropout, packed_tokens=case.packed_tokens)
            self.first_step_seconds = round(self.busy_seconds + time.monotonic() - began, 2)
            set_adapter(self.peer, self.start)
        taken = take(steps, dropout=dropout, packed_tokens=case.packed_tokens, gradient=gradient)
        answer = {
            "tokens": case.tokens,
            "step_seconds": taken.seconds,
            "losses": taken.losses,
            "gradient_norms": taken.gradient_norms,
            "first_step_seconds": self.first_step_seconds,
            **self.decided.get(name, {}),
        }
        if cuda:
            answer["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            answer["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            answer["process_device_bytes"] = process_device_bytes()
            answer["allocator_room_bytes"] = room
            if hasattr(self.peer, "rest"):
                self.peer.rest()
            gc.collect()
            torch.cuda.empty_cache()
        return answer

    def _cap(self) -> int | None:
        """Hold the setting's budget; what the allocator may reserve."""
        import torch

        from bench.peers.memory import cap_allocator

        budget = self.setting.budget_gib
        return cap_allocator(int(budget * 2**30)) if budget and torch.cuda.is_available() else None

    def _prepare(self, case: Any) -> None:
        from bench.peers.cases import documents
        from bench.peers.stepping import take_steps

        steps = [documents(case, step, self.vocab, self.corpus) for step in range(2)]
        dropout = self.setting.dropout

        def two_steps() -> None:
            take_steps(self.peer, steps, dropout=dropout, packed_tokens=case.packed_tokens)

        if prepared := self.peer.prepare(case, two_steps):
            self.decided[case.name] = prepared


def main() -> None:
    """Answer commands until quit or the end of input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    worker = Worker(json.loads(sys.argv[1]))
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "quit":
            break
        try:
            answer = getattr(worker, command)(*arguments)
        except BaseException as error:
            kind = "memory" if "OutOfMemory" in type(error).__name__ else "error"
            answer = {kind: f"{type(error).__name__}: {error}"[:600], "trace": traceback.format_exc()[-1500:]}
        if "trace" in answer and worker.peer is not None:
            _forget_failed(worker)  # out here, where the error no longer holds the failed step's tensors
        print(f"# {time.monotonic() - BEGAN:.1f} s: {line.strip()}", file=sys.stderr, flush=True)
        answers.write(json.dumps(answer) + "\n")
    os._exit(0)  # leave without the libraries' tear-down, which takes seconds


def _forget_failed(worker: Worker) -> None:
    import torch

    for parameter in worker.peer.adapter.values():
        parameter.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
