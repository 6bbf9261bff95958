"""A setting's process as the driver sees it: one command at a time, one answer each (bench/peers/worker.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.cases import CACHE, Job, Setting

ROOT = Path(__file__).resolve().parent.parent.parent
LOG_CHARACTERS = 3000


@dataclass
class Process:
    """One job's process and all it has answered."""

    job: Job
    out: Path
    loaded: dict[str, Any] = field(default_factory=dict)
    curve: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        """Who trains, and how."""
        return self.job.setting

    def start(self, folder: Path, cache: Path) -> None:
        """Begin to import; nothing is loaded yet.

        Args:
            folder: of the model.
            cache: as in `environment_of`.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        job = {"setting": dataclasses.asdict(self.setting), "folder": str(folder), "out": str(self.out)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.peers.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.out / "log.txt").open("w"),
            text=True,
            cwd=self.out,
            env=environment_of(cache),
        )

    def ask(self, *command: object) -> dict[str, Any]:
        """One command, one answer; a process that died answers with an error."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(" ".join(map(str, command)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"error": f"the process ended: {self.log()[-600:]}"}

    def stop(self) -> None:
        """End the process, which may be in any state."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def log(self) -> str:
        """The end of what it said, without the place of this checkout."""
        text = (self.out / "log.txt").read_text(errors="replace")
        return text[-LOG_CHARACTERS:].replace(f"{ROOT}/", "")


def environment_of(folder: Path) -> dict[str, str]:
    """For processes that import from here; all share one cache folder, and with it what is known of the device."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return {**environment, "DRAWPLATE_CACHE": str(folder / CACHE)}
