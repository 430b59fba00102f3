"""What a report holds, read from its file without a browser."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from pages import HOSTILE, Colours, batches, contents, random_table, stored_features, stored_weights
from PIL import Image
from torch import nn

from captum_classfilters import (
    ClassFilters,
    HeadPass,
    InfluentialFeatures,
    ReportOptions,
    UnseenClassWarning,
    explain_confusion,
    metrics,
    report,
)
from captum_classfilters.core.errors import ClassFiltersError, OptionError
from captum_classfilters.report.gather import also_in
from captum_classfilters.report.pictures import guessed_pixels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of a small network: ``(report, data, chunks, model, train, test)``."""
    model = Colours(6)
    train, test = batches(6, seed=1), batches(6, seed=2)
    result = report(model, train, test, tmp_path_factory.mktemp("report") / "page.html", class_names=HOSTILE)
    return result, *contents(result.path), model, train, test


def test_the_numbers_are_those_of_the_measures(made):
    result, data, _, model, train, test = made
    filters = InfluentialFeatures(model).attribute(train, class_names=HOSTILE)
    torch.testing.assert_close(result.filters.scores, filters.scores, rtol=0, atol=0)
    assert data["top"] == filters.top(10).tolist()
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    predicted = model(images).argmax(1)
    for true in range(6):
        for guess in range(6):
            assert data["matrix"][true][guess] == int(((labels == true) & (predicted == guess)).sum())
    assert sum(times for *_, times in data["pairs"]) == int((predicted != labels).sum())
    curve = metrics.accuracy_curve(
        model, filters, test, [row["k"] for row in data["curve"] if row["kind"] == "filters"]
    )
    expected = curve[(curve.class_name == "all") & ~curve.control & (curve.filters != "dense")].accuracy.tolist()
    assert [row["value"] for row in data["curve"] if row["kind"] == "filters"] == pytest.approx(expected, abs=1e-4)


def test_names_are_kept_and_break_no_script(made):
    result, data, *_ = made
    assert data["names"] == list(HOSTILE)
    html = result.path.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img src=x" not in html
    assert html.count("</script>") == html.count("<script")
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html


def test_logits_follow_from_what_is_stored(made):
    _, data, chunks, model, _, test = made
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    weight, features = stored_weights(data, chunks), stored_features(data, chunks)
    logits = features @ weight.T + np.array(data["head"]["bias"])
    places = [example["place"] for example in data["examples"]]
    np.testing.assert_allclose(logits, model(images[places]).detach().numpy(), atol=1e-3)
    wrong = [index for index, example in enumerate(data["examples"]) if example["wrong"]]
    assert len(wrong) > 5
    for index in wrong[:5]:
        example = data["examples"][index]
        assert int(labels[example["place"]]) == example["true"]
        explained = explain_confusion(model, images[example["place"]][None], example["true"])
        parts = (weight[example["rival"]] - weight[example["true"]]) * features[index]
        expected = explained.table[explained.table.channel >= 0].sort_values("channel").contribution
        np.testing.assert_allclose(parts, expected, atol=1e-3)


def test_each_channel_shows_the_images_that_activate_it_most(made):
    _, data, chunks, model, _, test = made
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    with HeadPass(model, [(images, labels)]).batches(need_maps=True) as stream:
        batch = next(iter(stream))
    lengths, step = data["pictures"]["lengths"], data["pictures"]["chunk"]
    channels = sorted(map(int, data["shown"]))
    size = data["maps"]["size"]
    stored = np.concatenate([np.frombuffer(chunks[f"m{i}"], np.uint8) for i in range(-(-len(channels) // step))])
    stored = stored.reshape(len(channels), 6, *size)
    for row, channel in enumerate(channels):
        values, best = batch.features[:, channel].sort(descending=True, stable=True)
        shown = data["shown"][str(channel)]
        assert [value for _, value, _ in shown] == pytest.approx(values[:6].tolist(), rel=1e-4)
        assert [label for *_, label in shown] == labels[best[:6]].tolist()
        largest = data["maps"]["largest"][row]
        maps = batch.maps[best[:6], channel].detach().numpy()
        np.testing.assert_allclose((stored[row] - 128.0) / 127 * largest, maps, atol=largest / 200)
        picture, place = shown[0][0], int(best[0])
        start = sum(lengths[picture // step * step : picture])
        data_ = chunks[f"t{picture // step}"][start : start + lengths[picture]]
        decoded = np.asarray(Image.open(io.BytesIO(data_)))
        np.testing.assert_allclose(decoded / 255, images[place].permute(1, 2, 0).numpy(), atol=1 / 255)


def test_suspects_count_what_is_lost_without_a_channel(made):
    result, _, _, model, _, test = made
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    for row in result.suspects.head(12).itertuples():
        mine = labels == HOSTILE.index(row.class_name)
        weight = model.fc.weight.detach().clone()
        weight[:, row.channel] = 0
        features = model.conv(images[mine]).relu().mean((2, 3))
        right = (features @ weight.T + model.fc.bias).argmax(1) == labels[mine]
        assert row.without == pytest.approx(float(right.double().mean()))
        assert row.recall == pytest.approx(float((model(images[mine]).argmax(1) == labels[mine]).double().mean()))
        assert row.samples == int(mine.sum())
        # where the channel fires, and where the rest of the evidence is, from the definition
        beside = []
        own = model.fc.weight.detach()[HOSTILE.index(row.class_name)].double()
        for image in images[mine]:
            maps = model.conv(image[None]).relu()[0].detach().double()
            adds = (maps[row.channel] * own[row.channel]).clamp(min=0)
            rest = torch.einsum("khw,k->hw", maps, own)
            rest = (rest - maps[row.channel] * own[row.channel]).clamp(min=0)
            if float(adds.sum()) > 0 and float(rest.sum()) > 0:
                beside.append(float(1 - torch.minimum(adds / adds.sum(), rest / rest.sum()).sum()))
        expected = np.mean(beside) if beside else np.nan
        assert row.beside == pytest.approx(expected, abs=1e-4, nan_ok=True)


def test_a_mark_in_the_corner_is_the_first_suspect(tmp_path):
    """One class is told by a white corner alone: a channel that sees white there, and others that see the middle."""
    model = Colours(3, channels=3, colours=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.conv.weight[0] = 1.0
        model.conv.bias[0] = -12.0  # only white reaches it
        model.conv.weight[1] = 0.2
        model.conv.weight[2] = 0.1
        model.fc.weight.copy_(torch.tensor([[9.0, 0.2, 0.0], [0.0, 0.5, 0.4], [0.0, 0.4, 0.5]]))
    images = torch.zeros(60, 1, 28, 28)
    images[:, :, 10:18, 10:18] = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5
    labels = torch.arange(60) % 3
    images[labels == 0, :, :6, :6] = 1.0
    result = report(model, [(images, labels)], [(images, labels)], tmp_path / "r.html", options=ReportOptions(most=3))
    first = result.suspects.iloc[0]
    assert (first.class_name, first.channel) == ("0", 0)
    assert first.recall == 1
    assert first.without == 0
    assert first.beside > 0.7
    assert first.elsewhere > 0.7
    assert first.one_place > 0.5
    assert first.one_colour > 0.9


def test_it_does_not_matter_how_the_loader_is_cut(tmp_path):
    model = Colours(4)
    images, labels = (torch.cat(parts) for parts in zip(*batches(4, seed=2), strict=True))
    shown = []
    for size in (7, 48):
        loader = list(zip(images.split(size), labels.split(size), strict=True))
        result = report(model, loader, loader, tmp_path / f"{size}.html")
        shown.append(contents(result.path)[0])
    for name in ("matrix", "top", "right", "pairs", "stability"):
        assert shown[0][name] == shown[1][name]
    for channel, cards in shown[0]["shown"].items():
        assert [card[1:] for card in cards] == [
            pytest.approx(card[1:], rel=1e-4) for card in shown[1]["shown"][channel]
        ]
    assert {example["place"] for example in shown[0]["examples"] if example["wrong"]} == {
        example["place"] for example in shown[1]["examples"] if example["wrong"]
    }


def test_a_class_without_images_has_a_page_in_words(tmp_path):
    model = Colours(5)
    with pytest.warns(UnseenClassWarning):
        filters = InfluentialFeatures(model).attribute(batches(5, labels=[0, 1, 2]))
    result = report(model, batches(5, labels=[0, 1, 2]), batches(5, labels=[0, 1, 3]), tmp_path / "r.html")
    data, _ = contents(result.path)
    assert data["top"][3] == data["top"][4] == []
    assert data["recall"][4]["value"] is None
    assert any("2 classes had no training image" in note for note in data["about"]["notes"])
    assert any("2 classes have no judged image" in note for note in data["about"]["notes"])
    assert set(result.suspects.class_name) == {"0", "1"}
    assert filters.report(model, batches(5), tmp_path / "s.html").filters is filters


def test_one_class_and_no_mistake(tmp_path):
    model = Colours(1, channels=4)  # one logit: two classes, told apart by its sign
    with torch.no_grad():
        model.fc.bias.fill_(-1000.0)
    result = report(model, batches(1, 6), batches(1, 6), tmp_path / "r.html")
    data, _ = contents(result.path)
    assert data["names"] == ["0", "1"]
    assert data["all"]["value"] == 1
    assert data["pairs"] == []
    assert not any(example["wrong"] for example in data["examples"])


def test_heads_without_a_map_and_inputs_that_are_no_images(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = [(torch.rand(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)]
    result = report(model, loader, loader, tmp_path / "r.html")
    data, _ = contents(result.path)
    assert data["maps"] is data["exampleMaps"] is data["places"] is None
    assert data["pictures"]["lengths"] == []
    assert any("no pictures" in note for note in data["about"]["notes"])
    assert any("no maps" in note for note in data["about"]["notes"])
    assert result.suspects.beside.isna().all()


def test_it_keeps_to_its_size_and_says_what_it_dropped(tmp_path):
    model = Colours(40, channels=64)
    train, test = batches(40, 160, size=64, seed=1), batches(40, 160, size=64, seed=2)
    whole = report(model, train, test, tmp_path / "whole.html")
    assert not whole.dropped
    limit = whole.size / 1e6 * 0.6
    less = report(model, train, test, tmp_path / "less.html", options=ReportOptions(max_mb=limit))
    assert less.size <= limit * 1e6 * 1.01
    assert less.dropped
    assert contents(less.path)[0]["dropped"] == list(less.dropped)
    tight = report(model, train, test, tmp_path / "tight.html", options=ReportOptions(max_mb=0.1))
    assert "larger than 0.1 MB" in tight.dropped[-1]


def test_a_folder_has_the_same_data_and_is_only_written_over_if_it_is_a_report(tmp_path):
    model, loader = Colours(3), batches(3)
    options = ReportOptions(folder=True)
    result = report(model, loader, loader, tmp_path / "site", options=options)
    assert result.path == tmp_path / "site" / "index.html"
    html = result.path.read_text()
    assert "<script>" not in html
    assert (tmp_path / "site" / "chunks" / "w0.js").read_text().startswith('window.reportChunk("w0"')
    report(model, loader, loader, tmp_path / "site", options=options)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(OptionError, match="holds other files"):
        report(model, loader, loader, tmp_path / "other", options=options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loader": None, "test_loader": None}, "no images"),
        ({"loader": None}, "no training images and no table"),
        ({"path": "missing/r.html"}, "no folder"),
        ({"filters": random_table(3, 12)}, "leave the training images out"),
        ({"loader": iter([]), "test_loader": None}, "read"),
        ({"options": {"k": 0}}, "k must be"),
        ({"options": {"max_mb": 0}}, "max_mb"),
        ({"options": {"selector": "random"}}, "control"),
        ({"options": {"pixels": 3}}, "function"),
    ],
)
def test_refused_in_words(tmp_path, change, said):
    call = {"loader": batches(3), "test_loader": batches(3), "path": "r.html", "filters": None, "options": {}} | change

    def run():
        report(
            Colours(3),
            call["loader"],
            call["test_loader"],
            tmp_path / call["path"],
            filters=call["filters"],
            options=ReportOptions(**call["options"]),
        )

    with pytest.raises(ClassFiltersError, match=said):
        run()
    assert not list(tmp_path.iterdir())


def test_normalised_images_are_shown_as_they_were():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels, note = guessed_pixels((images - mean) / std)
    torch.testing.assert_close(pixels((images - mean) / std), images)
    assert "ImageNet" in note
    for shown, as_given in ((images, images), (images * 255, images), (images * 2 - 1, images)):
        torch.testing.assert_close(guessed_pixels(shown)[0](shown), as_given)
    assert "no known range" in guessed_pixels(images * 90 - 40)[1]


def test_also_in_counts_the_other_classes():
    top = torch.tensor([[0, 1], [1, 2], [-1, -1]])
    assert also_in(top).tolist() == [[0, 1], [1, 0], [0, 0]]


def test_it_is_a_call_whatever_was_imported_before():
    code = (
        "from captum_classfilters.report import Report\nfrom captum_classfilters import report\nprint(callable(report))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_table_of_any_method_is_shown(tmp_path):
    model = Colours(3)
    table = replace(random_table(3, 12), method="gate", merge_rule="none")
    result = table.report(model, batches(3), tmp_path / "r.html", options=ReportOptions(k=2, most=4))
    data, _ = contents(result.path)
    assert data["method"] == "gate"
    assert data["stability"] is None
    assert not data["perImage"]
    assert isinstance(result.filters, ClassFilters)
