"""`report`: one HTML file from the command line."""

import json


def test_the_file_is_written_and_said(run, shared_images, checkpoint, tmp_path):
    words = ["resnet18", shared_images / "train", "--weights", checkpoint, "--image-size", 64, "--num-classes", 3]
    out = tmp_path / "report.html"
    ran = run("report", *words, "--judge", shared_images / "val", "--out", out, "--json")
    assert ran.status == 0, ran.err
    page = out.read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    facts = json.loads(ran.out)
    assert all(name in page for name in facts["classes"])
    assert "https://" not in page.split("</style>")[0]


def test_a_folder_that_is_not_there_is_told_and_nothing_is_written(run, checkpoint, tmp_path):
    ran = run("report", "resnet18", tmp_path / "nowhere", "--weights", checkpoint, "--out", tmp_path / "report.html")
    assert ran.status == 1
    assert "there is no folder" in ran.err
    assert not (tmp_path / "report.html").exists()
