"""Standard error as a person's screen and as a file for libraries, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import logging, os, sys, warnings
from pathlib import Path
from drawplate.screen import library_output, log_into, open_standard_streams, screen
open_standard_streams()
with library_output():
    bound = logging.StreamHandler()
    warnings.warn("of Python")
    os.write(2, b"of C\\n")
    log_into(Path(sys.argv[1]))
    bound.emit(logging.LogRecord("a", 30, "", 0, "of a logger made before", (), None))
    os.system("echo of a process >&2")
    screen().write("for a person\\n")
print("after", file=sys.stderr)
"""


def run(folder: Path, code: str = CODE, closed: str = "") -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_screen_has_drawplates_words_and_the_log_has_everybody_elses(tmp_path):
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, "for a person\nafter\n")
    log = (tmp_path / "log.txt").read_text()
    for said in ("UserWarning: of Python", "of C", "of a logger made before", "of a process"):
        assert said in log
    assert "for a person" not in log


def test_a_log_in_which_nothing_was_written_goes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from drawplate.screen import library_output, log_into\n"
        "with library_output(): log_into(Path(sys.argv[1]))"
    )
    assert run(tmp_path, code).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_empty_and_no_file_gets_their_descriptors(tmp_path, closed):
    code = (
        "import sys; from drawplate.screen import open_standard_streams\n"
        "open_standard_streams()\n"
        "with open(sys.argv[1] + '/file', 'w') as file:\n"
        "    print('lost', file=sys.stderr, flush=True); file.write(str(file.fileno() > 2))\n"
    )
    assert run(tmp_path, code, closed).returncode == 0
    assert (tmp_path / "file").read_text() == "True"


def test_a_program_that_imports_drawplate_keeps_its_standard_error(tmp_path):
    code = (
        "import sys; from pathlib import Path; before = sys.stderr; import drawplate.screen as s\n"
        "s.log_into(Path(sys.argv[1])); assert s.screen() is before is sys.stderr"
    )
    assert run(tmp_path, code).returncode == 0
    assert list(tmp_path.iterdir()) == []
