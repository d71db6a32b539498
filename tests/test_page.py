"""Laws of what the page tells of each word: how sure the model was, and where it looked."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_captioners import IMAGES, build

import caption
from modeling.captioner import Captioner
from reporting.page import NUM_LOOKS, write_page

WORDS = (" a", " red", " d", "og")
CORNERS = ([[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 1]])
HOSTILE = "</span><script>document.title = 'hacked'</script>\" onfocus=\"document.title='hacked'"


def record_of(image_id: str = "1", cider: float = 1.0, words: tuple[str, ...] = WORDS, **changes: object) -> dict:
    """A caption of which each token was looked for in a corner of its own, and was less sure than the one before."""
    tokens = [
        {"text": word, "probability": 1 - 0.33 * place, "attention": CORNERS[place]} for place, word in enumerate(words)
    ]
    told = {"image_id": image_id, "caption": "".join(words).strip(), "references": ["a dog"], "cider": cider}
    return told | {"tokens": tokens, "center_crop": None} | changes


def page_of(folder: Path, records: list[dict], size: tuple[int, int] = (200, 100)) -> Path:
    return write_page(folder, (Image.new("RGB", size, "white") for _ in records), records, {"metrics": {"cider": 0.5}})


class Cards(HTMLParser):
    """What stands in each card: its caption, its tokens and its map."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.cards, self.inside = [], ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "article":
            self.cards.append({"caption": "", "sure": [], "looks": None, "elements": []})
        if not self.cards:
            return
        self.cards[-1]["elements"].append(tag)
        self.inside = attributes.get("class", self.inside)
        if tag == "canvas":
            self.cards[-1]["looks"] = (int(attributes["data-side"]), base64.b64decode(attributes["data-looks"]))
        if "data-sure" in attributes:
            self.cards[-1]["sure"].append((attributes["data-sure"], attributes["style"]))

    def handle_data(self, data):
        if self.cards and self.inside in ("caption", "token"):
            self.cards[-1]["caption"] += data

    def handle_endtag(self, tag):
        if tag == "p":
            self.inside = ""


def test_words_are_the_caption_and_the_less_sure_the_stronger_their_ground(tmp_path):
    (card,) = Cards(page_of(tmp_path, [record_of()])).cards
    assert card["caption"] == "a red dog"
    assert [sure for sure, _ in card["sure"]] == ["100 %", "67 %", "34 %", "1 %"]
    doubts = [int(re.search(r"--doubt:(\d+)%", style).group(1)) for _, style in card["sure"]]
    assert doubts == [0, 33, 66, 99]


def test_a_map_holds_a_byte_for_each_place_of_each_word(tmp_path):
    weights = [[0.1, 0.0, 0.05], [0.2, 0.4, 0.1], [0.0, 0.02, 0.0]]
    record = record_of(words=(" a", " b"))
    record["tokens"][1]["attention"] = weights
    record["tokens"][0]["attention"] = [[0.0] * 3] * 3  # all of it went to the class token
    side, content = Cards(page_of(tmp_path, [record])).cards[0]["looks"]
    assert (side, len(content)) == (3, 2 * 9)
    assert list(content[:9]) == [0] * 9
    assert list(content[9:]) == [64, 0, 32, 128, 255, 64, 0, 13, 0]


def test_maps_are_kept_for_the_first_the_worst_and_the_best_only(tmp_path):
    number, third = 3 * NUM_LOOKS, NUM_LOOKS // 3
    records = [record_of(str(place), cider=place * 37 % number) for place in range(number)]
    cards = Cards(page_of(tmp_path, records, (8, 8))).cards
    with_map = {place for place, card in enumerate(cards) if card["looks"]}
    worst = {place for place in range(number) if records[place]["cider"] < third}
    best = {place for place in range(number) if records[place]["cider"] >= number - third}
    assert with_map == set(range(third)) | worst | best
    assert all(card["sure"] for card in cards)
    few = Cards(page_of(tmp_path, records[:NUM_LOOKS], (8, 8))).cards
    assert all(card["looks"] for card in few)


def test_hostile_tokens_add_no_element(tmp_path):
    hostile = Cards(page_of(tmp_path, [record_of(words=(HOSTILE, HOSTILE))])).cards[0]
    assert hostile["elements"] == Cards(page_of(tmp_path, [record_of(words=("a", "b"))])).cards[0]["elements"]


def test_captions_without_what_is_told_of_words(tmp_path):
    records = [record_of(tokens=[]), record_of("2")]
    for token in records[1]["tokens"]:
        del token["attention"]  # the LSTM captioner without attention
    bare, sure = Cards(page_of(tmp_path, records)).cards
    assert (bare["caption"], bare["sure"], bare["looks"]) == ("a red dog", [], None)
    assert (sure["caption"], len(sure["sure"]), sure["looks"]) == ("a red dog", 4, None)


def test_the_page_that_caption_py_writes_tells_of_each_word(tmp_path):
    build("vit_gpt2").save(tmp_path / "model")
    for place, image in enumerate(IMAGES[:2]):
        image.save(tmp_path / f"{place}.png")
    images = [str(tmp_path / f"{place}.png") for place in range(2)]
    caption.main([*images, "--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "page.html")])
    cards = Cards(tmp_path / "page.html").cards
    assert len(cards) == 2
    assert all(len(card["sure"]) == len(card["caption"].split()) > 0 and card["looks"][0] == 2 for card in cards)


def test_no_more_words_are_looked_at_than_the_page_shows(tmp_path, monkeypatch):
    build("vit_gpt2").save(tmp_path / "model")
    for place, image in enumerate(IMAGES[:3]):
        image.save(tmp_path / f"{place}.png")
    monkeypatch.setattr(caption, "NUM_IMAGES_ON_PAGE", 1)
    inspected, generate = [], Captioner.generate
    monkeypatch.setattr(Captioner, "generate", lambda *given: inspected.append(given[-1]) or generate(*given))
    images = [str(tmp_path / f"{place}.png") for place in range(3)]
    options = [
        "--model_name_or_path",
        str(tmp_path / "model"),
        "--output",
        str(tmp_path / "page.html"),
        "--batch_size",
        "1",
    ]
    caption.main([*images, *options])
    assert inspected == [True, False, False] and len(Cards(tmp_path / "page.html").cards) == 1


# In a browser


@pytest.fixture
def open_page(browser):
    """Open a page in a context of its own; closed when the test ends, which finds no word on the console."""
    contexts, words = [], []

    def open_in(path: Path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: words.append(message.text))
        page.on("pageerror", lambda error: words.append(str(error)))
        page.on("request", lambda request: words.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert not words


def brightness_of_corners(locator) -> list[int]:
    """How bright a part of the page is, upper left, upper right, lower left, lower right; away from what is told there."""
    image = Image.open(io.BytesIO(locator.screenshot())).convert("L")
    places = [(x * image.width // 8, y * image.height // 8) for y in (1, 6) for x in (1, 7)]
    return [image.getpixel(place) for place in places]


def test_pointing_at_a_word_darkens_what_was_not_looked_at(tmp_path, open_page):
    page = open_page(page_of(tmp_path, [record_of(), record_of("2")]), viewport={"width": 900, "height": 900})
    image, tokens = page.locator(".image").first, page.locator("article .token")
    for place in range(4):
        tokens.nth(place).hover()
        corners = brightness_of_corners(image)
        assert max(range(4), key=corners.__getitem__) == place
        assert corners[place] > 150 > 120 > sorted(corners)[2]
        assert page.locator(".told").first.inner_text().split() == [
            WORDS[place].strip(),
            *[["100", "67", "34", "1"][place], "%"],
        ]
    assert brightness_of_corners(page.locator(".image").nth(1)) == [255] * 4
    page.locator("h1").hover()
    assert brightness_of_corners(image) == [255] * 4


def test_where_a_model_sees_the_middle_alone_the_margin_stays_dark(tmp_path, open_page):
    record = record_of(words=(" a",), center_crop=1.0)
    record["tokens"][0]["attention"] = [[0.25, 0.25], [0.25, 0.25]]
    page = open_page(page_of(tmp_path, [record], (200, 100)))
    page.locator("article .token").hover()
    image = Image.open(io.BytesIO(page.locator(".image").screenshot())).convert("L")
    row = [image.getpixel((image.width * place // 100, image.height // 3)) for place in (5, 20, 30, 50, 70, 80, 95)]
    assert [brightness > 150 for brightness in row] == [False, False, True, True, True, False, False]


def test_words_are_walked_by_keyboard(tmp_path, open_page):
    page = open_page(page_of(tmp_path, [record_of(), record_of("2")]))
    told = page.locator(".told")
    seen = []
    for key in ("j", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append(told.first.inner_text().split(" ")[0])
    assert seen == ["", "a", "red", "d", "red", "a", "a"]
    page.keyboard.press("j")
    page.keyboard.press("Tab")  # one stop an image
    assert [told.nth(0).inner_text(), told.nth(1).inner_text().split()[0]] == ["", "a"]
    page.keyboard.press("Shift+Tab")
    assert told.nth(1).inner_text() == "" and told.nth(0).inner_text().split()[0] == "a"


def test_on_a_telephone_words_are_tapped_and_nothing_sticks_out(tmp_path, open_page):
    records = [record_of(), record_of("2", words=("x" * 80, " b"))]
    page = open_page(page_of(tmp_path, records), viewport={"width": 340, "height": 700}, has_touch=True, is_mobile=True)
    page.locator("article .token").nth(1).tap()
    assert page.locator(".told").first.inner_text().split() == ["red", "67", "%"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    texts = page.locator("article .text")
    assert all(texts.nth(place).evaluate("text => text.scrollWidth <= text.clientWidth") for place in range(2))
    assert not page.locator(".keys").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_can_be_read_by_day_and_by_night(tmp_path, open_page, scheme):
    """WCAG 2.2, 1.4.3: text of this size stands out 4.5 to 1 from what lies behind it."""
    page = open_page(page_of(tmp_path, [record_of()]), color_scheme=scheme)
    contrasts = page.evaluate(
        """() => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
          const paint = (...colors) => {
            for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
            const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
              .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
          };
          return [...document.querySelectorAll(".token, .shuffled, .references li, .legend, .foot, .id")].map((part) => {
            const style = getComputedStyle(part);
            const card = getComputedStyle(part.closest("article") ?? document.body).backgroundColor;
            const behind = paint(card, style.backgroundColor);
            const ink = paint(card, style.color);
            return (Math.max(behind, ink) + 0.05) / (Math.min(behind, ink) + 0.05);
          });
        }"""
    )
    assert len(contrasts) >= 4 + 5 + 3
    assert min(contrasts) >= 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == (scheme == "dark")
