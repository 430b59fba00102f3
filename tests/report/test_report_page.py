"""The page in a browser: every view by link and by key, live logits, both themes, hostile names, large data."""

import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pages import HOSTILE, Colours, batches, random_table
from torch import nn

from captum_classfilters import ReportOptions, report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium on this machine: apt-get install chromium"),
]


FAINT = r"""() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\d.]+/g).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (!/, 0(\.\d+)?\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const contrast = (node) => {
    const [x, y] = [light(getComputedStyle(node).color), light(behind(node))].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  };
  return [...document.querySelectorAll("main *")]
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .filter((node) => node.getClientRects().length && !(node instanceof SVGElement))
    .map((node) => [contrast(node), node.textContent.slice(0, 30)]).filter(([value]) => value < 4.5);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path, route="/", **options):
    """A page that must ask for nothing and complain of nothing."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, **options)
    complaints, requests = [], []
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    folder = path.parent.as_uri()
    page.on("request", lambda ask: ask.url.startswith(("blob:", "data:", folder)) or requests.append(ask.url))
    page.goto(f"{path.as_uri()}#{route}")
    yield page
    page.wait_for_timeout(100)
    page.close()
    assert complaints == []
    assert requests == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A report of 6 classes with hostile names: ``(path, model, test images, labels)``."""
    model = Colours(6)
    train, test = batches(6, seed=1), batches(6, seed=2)
    path = tmp_path_factory.mktemp("page") / "page.html"
    report(model, train, test, path, class_names=HOSTILE)
    return path, model, *(torch.cat(parts) for parts in zip(*test, strict=True))


def go(page, route):
    page.evaluate(f"location.hash = {route!r}")


def number(page, selector, attribute):
    return float(page.get_attribute(selector, attribute))


def test_every_view_by_link(browser, small):
    with opened(browser, small[0]) as page:
        assert page.inner_text("h1").startswith("Colours")
        assert page.is_visible("#classes")
        page.click("nav >> text=Confusions")
        assert page.inner_text("h1") == "Confusions"
        page.click(".matrix td a >> nth=0")
        page.wait_for_selector("#difference")
        assert "and not" in page.inner_text("h1")
        page.click(".contributions a >> nth=0")
        assert re.fullmatch(r"Channel \d+", page.inner_text("h1"))
        page.wait_for_selector(".frame img[src^=blob]")
        page.click("nav >> text=Suspects")
        assert page.locator(".suspect").count() == 8
        page.click("text=Show all")
        assert page.locator(".suspect").count() > 8
        page.click(".suspect h3 a >> nth=1")
        assert page.inner_text("h1") in HOSTILE
        page.click("nav >> text=About")
        assert "report(model" in page.inner_text("pre")
        page.go_back()
        assert page.inner_text("h1") in HOSTILE
        go(page, "#/class/99")
        assert "No such class" in page.inner_text("h1")


def test_every_view_by_key(browser, small):
    with opened(browser, small[0]) as page:
        page.keyboard.press("j")
        page.wait_for_selector("main[data-view=class]")
        assert page.inner_text("h1") == HOSTILE[0]
        page.keyboard.press("k")
        page.wait_for_function("name => document.querySelector('h1').textContent === name", arg=HOSTILE[-1])
        page.keyboard.press("c")
        page.wait_for_selector("#difference")
        before = page.evaluate("location.hash")
        if page.locator("button.tile").count() > 1:
            page.keyboard.press("j")
            page.wait_for_function("hash => location.hash !== hash", arg=before)
        theme = page.evaluate("document.documentElement.dataset.theme")
        page.keyboard.press("d")
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        assert not page.is_visible("#help")
        page.keyboard.press("/")
        page.keyboard.type("fox")
        page.keyboard.press("Enter")
        page.wait_for_function("name => document.querySelector('h1').textContent === name", arg="🦊 fox")
        page.keyboard.press("/")
        page.keyboard.type("channel 3")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('h1').textContent === 'Channel 3'")
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_contributions_sum_to_the_difference_and_logits_are_pytorchs(browser, small):
    path, model, images, labels = small
    features = model.conv(images).relu().mean((2, 3)).detach()
    logits = model(images).detach()
    predicted = logits.argmax(1)
    image = int((predicted != labels).nonzero()[0])
    won, lost = int(predicted[image]), int(labels[image])
    with opened(browser, path, f"/why/{won}/{lost}") as page:
        page.wait_for_selector("#difference")
        shown = int(re.search(r"\d+", page.inner_text("#detail h3"))[0])

        def expected(off=()):
            kept = features[shown].clone()
            kept[list(off)] = 0
            return model.fc(kept).detach()

        def check(off=()):
            logits = expected(off)
            parts = [
                float(cell.get_attribute("data-contribution")) for cell in page.locator("[data-contribution]").all()
            ]
            difference = number(page, "#difference", "data-difference")
            assert sum(parts) == pytest.approx(difference, abs=1e-6)
            assert difference == pytest.approx(float(logits[won] - logits[lost]), abs=1e-3)
            for row in page.locator("#logits tr[data-class]").all():
                value = float(row.locator("[data-logit]").get_attribute("data-logit"))
                assert value == pytest.approx(float(logits[int(row.get_attribute("data-class"))]), abs=1e-3)

        assert int(predicted[shown]) == won
        assert int(labels[shown]) == lost
        check()
        boxes = page.locator(".contributions input")
        first, third = (int(boxes.nth(place).get_attribute("data-channel")) for place in (0, 2))
        boxes.nth(0).uncheck()
        check([first])
        page.locator(f".contributions input[data-channel='{third}']").uncheck()
        check([first, third])
        page.click("#all-on")
        check()
        page.click("#three-off")
        weight = (model.fc.weight[won] - model.fc.weight[lost]).detach() * features[shown]
        check(weight.topk(3).indices[weight.topk(3).values > 0].tolist())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_can_be_read(browser, small, scheme):
    """Text against its background: a contrast of at least 4.5, as WCAG asks for."""
    with opened(browser, small[0], color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        for route in ("/", "/class/1", "/suspects", "/about", "/confusions", "/why/1/0"):
            go(page, "#" + route)
            page.wait_for_timeout(200)
            assert page.evaluate(FAINT) == []


def test_cards_follow_the_slider_and_the_overlay_its_box(browser, small):
    with opened(browser, small[0], "/class/0") as page:
        assert page.locator("#cards article").count() == 5
        page.locator("#k").fill("2")
        assert page.locator("#cards article").count() == 2
        page.wait_for_selector(".frame canvas")
        assert page.locator(".frame canvas:visible").count() > 0
        page.uncheck("#overlay")
        assert page.locator(".frame canvas:visible").count() == 0
        # in colour, as the images are
        page.wait_for_selector(".frame img[src^=blob]")
        colours = page.evaluate("""() => {
          const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
          context.drawImage(document.querySelector(".frame img"), 0, 0);
          return [...context.getImageData(5, 5, 1, 1).data].slice(0, 3);
        }""")
        assert max(colours) - min(colours) > 10


def test_a_summary_without_scripts(browser, small):
    with opened(browser, small[0], java_script_enabled=False) as page:
        text = page.inner_text("main")
        assert "猫とキツネ" in text
        assert "<script>alert(1)</script>" in text
        assert "Accuracy" in text
        assert "JavaScript" in text


def test_printed_it_has_no_controls(browser, small):
    with opened(browser, small[0], "/class/0") as page:
        page.emulate_media(media="print")
        assert not page.is_visible("#search")
        assert not page.is_visible("#k")
        assert page.is_visible("#cards article >> nth=0")


def test_everything_has_a_name_for_screen_readers(browser, small):
    with opened(browser, small[0]) as page:
        for route in ("/", "/class/1", "/suspects", "/why/1/0", "/confusions"):
            go(page, "#" + route)
            page.wait_for_timeout(200)
            assert page.locator("h1").count() == 1
            unnamed = """() => [...document.querySelectorAll("button, a, input, [role=img]")].filter((node) =>
              !(node.textContent.trim() || node.getAttribute("aria-label") || node.title || node.labels?.length))"""
            assert page.evaluate(unnamed) == []
            assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


def test_a_folder_works_as_the_file_does(browser, small, tmp_path):
    _, model, images, labels = small
    loader = [(images, labels)]
    made = report(model, loader, loader, tmp_path / "site", options=ReportOptions(folder=True))
    with opened(browser, made.path, "/class/0") as page:
        page.wait_for_selector(".frame img[src^=blob]")
        go(page, "#/confusions")
        page.click(".matrix td a >> nth=0")
        page.wait_for_selector("#difference")


@pytest.mark.parametrize(
    ("classes", "labels", "colours", "size"),
    [(1, None, 3, 28), (5, [0, 1, 3], 1, 28), (3, None, 3, 224), (3, None, 1, 28)],
    ids=["one class", "classes without images", "224 px in colour", "28 px in grey"],
)
def test_other_data(browser, tmp_path, classes, labels, colours, size):
    model = Colours(classes, colours=colours)
    loader = batches(classes, 24, size=size, colours=colours, labels=labels)
    made = report(model, loader, loader, tmp_path / "r.html")
    with opened(browser, made.path) as page:
        for route in (
            "/class/0",
            f"/class/{classes - 1}",
            "/confusions",
            "/suspects",
            "/about",
            "/channel/0",
            "/why/0/1",
        ):
            go(page, "#" + route)
            page.wait_for_timeout(150)
            assert page.is_visible("h1")
        if labels:
            go(page, f"#/class/{classes - 1}")
            assert "no training image" in page.inner_text("main")


def test_heads_without_a_map(browser, tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    loader = [(torch.rand(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)]
    made = report(model, loader, loader, tmp_path / "r.html")
    with opened(browser, made.path, "/class/0") as page:
        assert page.locator("#cards article").count() == 5
        assert "no pictures" in page.inner_text("main")
        go(page, "#/confusions")
        page.click(".matrix td a >> nth=0")
        page.wait_for_selector("#difference")


def test_a_thousand_classes_fit_and_open(browser, tmp_path):
    """1,000 classes and 2,048 channels: a file of at most 25 MB, whose pages answer; their times are printed."""
    generator = torch.Generator().manual_seed(0)
    model = Colours(1000, channels=2048, colours=3)
    images = torch.rand(600, 3, 7, 7, generator=generator)
    images = nn.functional.interpolate(images, (84, 84), mode="bicubic").clamp(0, 1)
    loader = list(zip(images.split(100), torch.arange(600).split(100), strict=True))
    table = random_table(1000, 2048, names=[f"class {index}" for index in range(1000)])
    made = table.report(model, loader, tmp_path / "large.html")
    assert made.size <= 25e6
    with opened(browser, made.path) as page:
        loaded = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        begun = page.evaluate("performance.now()")
        go(page, "#/class/500")
        page.wait_for_selector(".frame img[src^=blob]")
        ended = page.evaluate("performance.now()")
        print(f"{made.size / 1e6:.1f} MB, loaded in {loaded / 1000:.1f} s, a class in {(ended - begun) / 1000:.2f} s")
        go(page, "#/confusions")
        page.click("main td a >> nth=2")
        page.wait_for_selector("#difference")
    assert np.isfinite(loaded)
