"""What is typed: help at once, usage errors, the name of the command."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from captum_classfilters.__main__ import main

ROOT = Path(__file__).parents[2]
WHOLE = ("attribute", "resnet18", "pets", "--out", "o")


def test_help_answers_without_heavy_imports():
    code = (
        "import sys\nfrom captum_classfilters.__main__ import main\n"
        "try:\n    main(['attribute', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(*(name for name in ('torch', 'numpy', 'captum', 'matplotlib', 'pandas') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == ""
    assert "package.module:callable" in done.stdout
    assert "130 Ctrl-C" in done.stdout


def test_the_installed_command_is_the_same_function():
    line = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "captum-classfilters =" in line)
    module, _, name = line.split('"')[1].partition(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "demo,attribute,decompose"),
        (["attribute", "resnet18"], "DATA"),
        (["attribute", "resnet18", "pets"], "--out"),
        ([*WHOLE, "--selector", "histogram,best"], "expected names among histogr"),
        ([*WHOLE, "--selector", ","], "expected names among histogram"),
        ([*WHOLE, "--k", "0"], "a whole number of at least 1, got '0'"),
        ([*WHOLE, "--limit", "many"], "a whole number of at least 1, got 'many'"),
        ([*WHOLE, "--workers", "-1"], "a whole number of at least 0"),
        ([*WHOLE, "--std", "0"], "a number above 0, got '0'"),
        ([*WHOLE, "--std", "nan"], "a number above 0, got 'nan'"),
        ([*WHOLE, "--pretrained", "--weights", "f"], "not allowed with argument"),
        (["decompose", *WHOLE[1:], "--refit", "sgd"], "'least_squares'"),
        (["decompose", *WHOLE[1:], "--backend", "fast"], "'gather'"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_status_2(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
