"""The command line as a user runs it."""

import subprocess
import sys

import pytest

from captum_classfilters import ClassFilters
from captum_classfilters.__main__ import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "pictures"
    done = subprocess.run(
        [sys.executable, "-m", "captum_classfilters", "demo", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    return out, done


def test_demo_prints_the_table_and_says_where_the_pictures_are(demo):
    out, done = demo
    assert done.returncode == 0, done.stderr
    assert "ankle boot" in done.stdout
    assert "random" in done.stdout
    assert "of another image" in done.stdout
    assert "of attacked ones" in done.stdout
    assert "most confusing channels" in done.stdout
    assert "is classified as" in done.stdout
    assert str(out) in done.stdout
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [
        "accuracy_curve.png",
        "ald_tree.png",
        "class_filters.png",
        "explain.png",
        "filter_cards.png",
        "gate.png",
        "overlap.png",
        "paths.png",
    ]
    assert all((out / name).stat().st_size > 5000 for name in pictures)
    assert ClassFilters.load(out / "filters.safetensors").class_names[9] == "ankle boot"


def test_an_unusable_folder_is_an_error_in_words(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["demo", "--out", str(tmp_path / "file" / "below")]) == 1
    assert "choose another folder with --out" in capsys.readouterr().err


def test_no_command_shows_what_there_is(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "demo" in capsys.readouterr().err
