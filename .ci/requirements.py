"""Prints what pyproject.toml asks of some packages, a line each: python .ci/requirements.py transformers peft"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
asked = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
by_name = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0]: line.partition(";")[0].strip() for line in asked}
for name in sys.argv[1:]:
    print(by_name[name])
