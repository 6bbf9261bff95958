from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HUSHED = "import drawplate, drawplate.quiet; drawplate.quiet.hush_libraries(); "


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    for name in ("USE_HUB_KERNELS", "DISABLE_TELEMETRY", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM"):
        variables.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def planted_kernels(tmp_path):
    """A `kernels` package as it might be installed; loading anything with it leaves a canary."""
    canary = tmp_path / "canary"
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import pathlib\ndef get_kernel(*a, **k):\n    pathlib.Path({str(canary)!r}).touch()\n    raise RuntimeError\n"
    )
    return tmp_path, canary


def test_importing_bitsandbytes_says_nothing_and_fetches_no_kernel(planted_kernels):
    folder, canary = planted_kernels
    done = run_python(HUSHED + "import bitsandbytes", PYTHONPATH=str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not canary.exists()


def test_the_kernels_package_cannot_be_imported(planted_kernels):
    folder, _ = planted_kernels
    assert run_python("import kernels", PYTHONPATH=str(folder)).returncode == 0, "the planted package works by itself"
    done = run_python("import drawplate, kernels", PYTHONPATH=str(folder))
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def test_telemetry_is_off_whatever_the_environment_says():
    code = (
        "import drawplate, json; from huggingface_hub import constants as c; import datasets.config as d;"
        "print(json.dumps([c.HF_HUB_DISABLE_TELEMETRY, bool(d.HF_UPDATE_DOWNLOAD_COUNTS)]))"
    )
    done = run_python(code, HF_HUB_DISABLE_TELEMETRY="0")
    assert json.loads(done.stdout) == [True, False]


def test_noise_is_off_unless_the_user_asked_for_it():
    code = HUSHED + "import os; print(os.environ['TRANSFORMERS_VERBOSITY'], os.environ['TQDM_DISABLE'])"
    assert run_python(code).stdout.split() == ["error", "1"]
    assert run_python(code, TRANSFORMERS_VERBOSITY="info", TQDM_DISABLE="0").stdout.split() == ["info", "0"]


def test_future_warnings_are_for_developers_unless_asked_for():
    code = HUSHED + "import warnings; warnings.warn('soon', FutureWarning)"
    assert run_python(code).stderr == ""
    assert "soon" in run_python(code, PYTHONWARNINGS="default").stderr


def test_importing_drawplate_alone_leaves_other_peoples_progress_bars_on():
    code = "import drawplate, os; print(sorted(n for n in os.environ if 'PROGRESS' in n or 'TQDM' in n))"
    assert run_python(code).stdout.strip() == "[]"
