"""Laws of what the page shows of each token: its probability and its attention map."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from small_captioners import IMAGES, build

import caption
from captioning.outputs import Page
from modeling.captioner import Captioner
from reporting.page import NUM_ATTENTION_MAPS, write_page

WORDS = (" a", " red", " d", "og")
CORNERS = ([[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 1]])
HOSTILE = "</span><script>document.title = 'hacked'</script>\" onfocus=\"document.title='hacked'"


def record_of(image_id: str = "1", cider: float = 1.0, words: tuple[str, ...] = WORDS, **changes: object) -> dict:
    """A caption each of whose tokens attends to another corner and is less probable than the one before."""
    tokens = [
        {"text": word, "probability": 1 - 0.33 * index, "attention": CORNERS[index]} for index, word in enumerate(words)
    ]
    record = {"image_id": image_id, "caption": "".join(words).strip(), "references": ["a dog"], "cider": cider}
    return record | {"tokens": tokens, "center_crop": None} | changes


def page_of(folder: Path, records: list[dict], size: tuple[int, int] = (200, 100)) -> Path:
    return write_page(folder, (Image.new("RGB", size, "white") for _ in records), records, {"metrics": {"cider": 0.5}})


class Cards(HTMLParser):
    """What each card of a page holds: its caption, its tokens and their attention maps."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.cards, self.inside = [], ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "article":
            self.cards.append({"caption": "", "probability": [], "attention": None, "elements": []})
        if not self.cards:
            return
        self.cards[-1]["elements"].append(tag)
        self.inside = attributes.get("class", self.inside)
        if tag == "canvas":
            self.cards[-1]["attention"] = (int(attributes["data-side"]), base64.b64decode(attributes["data-attention"]))
        if "data-probability" in attributes:
            self.cards[-1]["probability"].append((attributes["data-probability"], attributes["style"]))

    def handle_data(self, data):
        if self.cards and self.inside in ("caption", "token"):
            self.cards[-1]["caption"] += data

    def handle_endtag(self, tag):
        if tag == "p":
            self.inside = ""


def test_tokens_make_up_the_caption_and_show_their_probability(tmp_path):
    (card,) = Cards(page_of(tmp_path, [record_of()])).cards
    assert card["caption"] == "a red dog"
    assert [text for text, _ in card["probability"]] == ["100%", "67%", "34%", "1%"]
    uncertainty = [int(re.search(r"--uncertainty:(\d+)%", style).group(1)) for _, style in card["probability"]]
    assert uncertainty == [0, 33, 66, 99]


def test_an_attention_map_has_a_byte_per_cell_and_token(tmp_path):
    weights = [[0.1, 0.0, 0.05], [0.2, 0.4, 0.1], [0.0, 0.02, 0.0]]
    record = record_of(words=(" a", " b"))
    record["tokens"][1]["attention"] = weights
    record["tokens"][0]["attention"] = [[0.0] * 3] * 3  # all attention on the class token
    side, content = Cards(page_of(tmp_path, [record])).cards[0]["attention"]
    assert (side, len(content)) == (3, 2 * 9)
    assert list(content[:9]) == [0] * 9
    assert list(content[9:]) == [64, 0, 32, 128, 255, 64, 0, 13, 0]


def test_attention_maps_are_kept_for_the_first_worst_and_best_images(tmp_path):
    number, third = 3 * NUM_ATTENTION_MAPS, NUM_ATTENTION_MAPS // 3
    records = [record_of(str(index), cider=index * 37 % number) for index in range(number)]
    cards = Cards(page_of(tmp_path, records, (8, 8))).cards
    with_map = {index for index, card in enumerate(cards) if card["attention"]}
    worst = {index for index in range(number) if records[index]["cider"] < third}
    best = {index for index in range(number) if records[index]["cider"] >= number - third}
    assert with_map == set(range(third)) | worst | best
    assert all(card["probability"] for card in cards)
    few = Cards(page_of(tmp_path, records[:NUM_ATTENTION_MAPS], (8, 8))).cards
    assert all(card["attention"] for card in few)


def test_hostile_tokens_add_no_element(tmp_path):
    hostile = Cards(page_of(tmp_path, [record_of(words=(HOSTILE, HOSTILE))])).cards[0]
    assert hostile["elements"] == Cards(page_of(tmp_path, [record_of(words=("a", "b"))])).cards[0]["elements"]


def test_captions_without_tokens_or_attention(tmp_path):
    records = [record_of(tokens=[]), record_of("2")]
    for token in records[1]["tokens"]:
        del token["attention"]  # the LSTM captioner without attention
    bare, with_tokens = Cards(page_of(tmp_path, records)).cards
    assert (bare["caption"], bare["probability"], bare["attention"]) == ("a red dog", [], None)
    assert (with_tokens["caption"], len(with_tokens["probability"]), with_tokens["attention"]) == ("a red dog", 4, None)


def test_the_page_that_caption_py_writes_shows_each_token(tmp_path):
    build("vit_gpt2").save(tmp_path / "model")
    for place, image in enumerate(IMAGES[:2]):
        image.save(tmp_path / f"{place}.png")
    images = [str(tmp_path / f"{place}.png") for place in range(2)]
    caption.main([*images, "--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "page.html")])
    cards = Cards(tmp_path / "page.html").cards
    assert len(cards) == 2
    assert all(
        len(card["probability"]) == len(card["caption"].split()) > 0 and card["attention"][0] == 2 for card in cards
    )


def test_caption_py_inspects_no_more_captions_than_the_page_shows(tmp_path, monkeypatch):
    build("vit_gpt2").save(tmp_path / "model")
    for place, image in enumerate(IMAGES[:3]):
        image.save(tmp_path / f"{place}.png")
    monkeypatch.setattr(Page, "num_images", 1)
    inspected, generate = [], Captioner.generate
    monkeypatch.setattr(
        Captioner, "generate", lambda *given, **more: inspected.append(given[-1]) or generate(*given, **more)
    )
    images = [str(tmp_path / f"{place}.png") for place in range(3)]
    options = ["--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "page.html")]
    options += ["--batch_size", "1"]
    caption.main([*images, *options])
    assert inspected == [True, False, False] and len(Cards(tmp_path / "page.html").cards) == 1


TRUTH = {"all": False, "number": True, "shape": False, "color": False, "size": True, "relation": True}


def test_false_words_are_marked_and_named_with_tokens_and_without(tmp_path):
    # "a red dog" of the tokens " a", " red", " d", "og": "red" and both tokens of "dog" are false.
    false = record_of(truth=TRUTH | {"false_words": [[2, 5], [6, 9]]})
    true = record_of("2", truth=dict.fromkeys(TRUTH, True) | {"false_words": []})
    records = [false, false | {"image_id": "3", "tokens": []}, true, record_of("4")]
    page = page_of(tmp_path, records).read_text(encoding="utf-8")
    captions = re.findall(r'<p class="caption".*?</p>', page, flags=re.DOTALL)
    marked = [re.findall(r"<mark[^>]*>(.*?)</mark>", caption) for caption in captions]
    assert marked == [["red", "d", "og"], ["red", "dog"], [], []]
    assert [re.sub(r"<.*?>", "", caption) for caption in captions] == ["a red dog"] * 4
    assert re.findall(r'<p class="truth.*?">(.*?)</p>', page) == [*["False: shape, color"] * 2, "True"]


def test_captions_that_are_not_made_up_of_their_tokens_are_shown_all_the_same(tmp_path):
    record = record_of(caption="a thing else", truth=TRUTH | {"false_words": [[0, 7]]})
    (card,) = Cards(page_of(tmp_path, [record])).cards
    assert card["caption"] == "a red dog" and card["elements"].count("mark") == 1  # "a", which both have


# In a browser


@pytest.fixture
def open_page(browser):
    """Open a page in a browser context of its own; at the end the console must be empty and nothing requested."""
    contexts, messages = [], []

    def open_in(path: Path, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: messages.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_in
    for context in contexts:
        context.close()
    assert not messages


def brightness_of_corners(locator) -> list[int]:
    """Brightness near the corners of an element: upper left, upper right, lower left, lower right; beside its text."""
    image = Image.open(io.BytesIO(locator.screenshot())).convert("L")
    places = [(x * image.width // 8, y * image.height // 8) for y in (1, 6) for x in (1, 7)]
    return [image.getpixel(place) for place in places]


def test_hovering_over_a_token_darkens_what_it_does_not_attend_to(tmp_path, open_page):
    page = open_page(page_of(tmp_path, [record_of(), record_of("2")]), viewport={"width": 900, "height": 900})
    image, tokens = page.locator(".image").first, page.locator("article .token")
    for place in range(4):
        tokens.nth(place).hover()
        corners = brightness_of_corners(image)
        assert max(range(4), key=corners.__getitem__) == place
        assert corners[place] > 150 > 120 > sorted(corners)[2]
        probability = ["100%", "67%", "34%", "1%"][place]
        assert page.locator(".token-info").first.inner_text().split() == [WORDS[place].strip(), probability]
    assert brightness_of_corners(page.locator(".image").nth(1)) == [255] * 4
    page.locator("h1").hover()
    assert brightness_of_corners(image) == [255] * 4


def test_what_is_cropped_away_stays_dark(tmp_path, open_page):
    record = record_of(words=(" a",), center_crop=1.0)
    record["tokens"][0]["attention"] = [[0.25, 0.25], [0.25, 0.25]]
    page = open_page(page_of(tmp_path, [record], (200, 100)))
    page.locator("article .token").hover()
    image = Image.open(io.BytesIO(page.locator(".image").screenshot())).convert("L")
    row = [image.getpixel((image.width * place // 100, image.height // 3)) for place in (5, 20, 30, 50, 70, 80, 95)]
    assert [brightness > 150 for brightness in row] == [False, False, True, True, True, False, False]


def test_the_keyboard_moves_between_images_and_tokens(tmp_path, open_page):
    page = open_page(page_of(tmp_path, [record_of(), record_of("2")]))
    info = page.locator(".token-info")
    shown = []
    for key in ("j", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
        shown.append(info.first.inner_text().split(" ")[0])
    assert shown == ["", "a", "red", "d", "red", "a", "a"]
    page.keyboard.press("j")
    page.keyboard.press("Tab")  # one tab stop per image
    assert [info.nth(0).inner_text(), info.nth(1).inner_text().split()[0]] == ["", "a"]
    page.keyboard.press("Shift+Tab")
    assert info.nth(1).inner_text() == "" and info.nth(0).inner_text().split()[0] == "a"


def test_false_captions_are_filtered_and_come_first(tmp_path, open_page):
    truths = [dict.fromkeys(TRUTH, True), TRUTH, dict.fromkeys(TRUTH, True), TRUTH]
    records = [record_of(str(index), truth=truth | {"false_words": [[2, 5]]}) for index, truth in enumerate(truths)]
    page = open_page(page_of(tmp_path, records))
    ids = page.locator("#cards > li:visible .id")
    page.select_option("#order", "false")
    assert ids.all_inner_texts() == ["1", "3", "0", "2"]
    page.check("#false-only")
    assert ids.all_inner_texts() == ["1", "3"] and page.locator("#count").inner_text() == "2 of 4"
    page.locator("#cards > li:visible mark").first.hover()
    assert page.locator("#cards > li:visible .token-info").first.inner_text().split() == ["red", "67%,", "false"]
    without = open_page(page_of(tmp_path, [record_of()]))
    assert not without.locator("#false-only").count() and not without.locator("#order [value=false]").count()


def test_on_a_phone_tokens_are_tapped_and_nothing_overflows(tmp_path, open_page):
    records = [record_of(), record_of("2", words=("x" * 80, " b"))]
    page = open_page(page_of(tmp_path, records), viewport={"width": 340, "height": 700}, has_touch=True, is_mobile=True)
    page.locator("article .token").nth(1).tap()
    assert page.locator(".token-info").first.inner_text().split() == ["red", "67%"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    texts = page.locator("article .text")
    assert all(texts.nth(place).evaluate("text => text.scrollWidth <= text.clientWidth") for place in range(2))
    assert not page.locator(".keys").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark_mode(tmp_path, open_page, scheme):
    """WCAG 2.2, 1.4.3: text of this size has a contrast of at least 4.5 to 1."""
    record = record_of(truth=TRUTH | {"false_words": [[2, 5]]}, shuffled_caption="a cat")
    page = open_page(page_of(tmp_path, [record]), color_scheme=scheme)
    contrasts = page.evaluate(
        """() => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
          const paint = (...colors) => {
            for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
            const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
              .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
          };
          return [...document.querySelectorAll(".token, .truth, .shuffled, .references li, .legend, .foot, .id")].map((part) => {
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
