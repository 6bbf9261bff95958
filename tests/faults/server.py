"""A process that has imported everything once and forks a fresh one for every job.

    request  {"argv": [...], "faults": [[name, {...}], ...], "out": FILE}   answer {"pid": N}
    request  {"wait": PID}                                                  answer {"code": N}, below 0 for a signal

A job is a command of `drawplate`, with faults from inject.py set up before it. The server itself never computes
anything, so that a fork is as good as a new process. A forked process cannot use a GPU; there, `--one REQUEST` does a
single job in this process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    import drawplate.run.tune  # noqa: F401
    from drawplate import cli
    from tests.faults import inject

    if sys.argv[1:2] == ["--one"]:
        _child(cli, inject, json.loads(sys.argv[2]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        process = os.fork()
        if process == 0:
            _child(cli, inject, request)
        print(json.dumps({"pid": process}), flush=True)


def _child(cli: Any, inject: Any, request: dict[str, Any]) -> None:
    code = 1
    try:
        descriptor = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, values in request["faults"]:
            getattr(inject, name)(**values)
        cli.app(args=request["argv"])
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
