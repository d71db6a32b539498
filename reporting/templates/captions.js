
"use strict";
// Order, filter, keyboard, and where the model looked. Without script the page still shows every image, in the order of the data.
const list = document.getElementById("cards");
const cards = [...list.children];
const order = document.getElementById("order");
const filter = document.getElementById("filter");
// The shuffled caption belongs to another image: its words find nothing here.
const textOf = (card) => [...card.querySelectorAll(".caption, .references, .id")].map((part) => part.textContent).join(" ");
const words = new Map(cards.map((card) => [card, textOf(card).toLowerCase()]));

const byCider = (sign) => (one, other) => sign * (Number(one.dataset.cider) - Number(other.dataset.cider));
const orders = {
  data: () => cards,
  worst: () => [...cards].sort(byCider(1)),
  best: () => [...cards].sort(byCider(-1)),
};

function arrange() {
  list.append(...orders[order.value]());
  const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    card.hidden = !wanted.every((word) => words.get(card).includes(word));
    shown += card.hidden ? 0 : 1;
  }
  document.getElementById("count").textContent = `${shown} of ${cards.length}`;
  document.getElementById("nothing").hidden = shown > 0;
}

function move(step) {
  const visible = [...list.children].filter((card) => !card.hidden);
  const here = visible.findIndex((card) => card.contains(document.activeElement));
  const next = here < 0 ? 0 : Math.min(Math.max(here + step, 0), visible.length - 1);
  if (visible.length) visible[next].firstElementChild.focus();
}

// Darken a word's image where the model did not look, and tell how sure it was; null brings the image back.
function look(card, token) {
  const [canvas, told] = [card.querySelector("canvas"), card.querySelector(".told")];
  told.textContent = token ? `${token.textContent.trim()}  ${token.dataset.sure}` : "";
  if (!canvas) return;
  canvas.hidden = !token;
  if (!token) return;
  const side = Number(canvas.dataset.side);
  const places = side * side;
  const start = [...card.querySelectorAll("article .token")].indexOf(token) * places;
  const bytes = atob(canvas.dataset.looks);
  const image = new ImageData(side, side);
  for (let place = 0; place < places; place++) {
    image.data.set([8, 8, 20, 0.78 * (255 - bytes.charCodeAt(start + place))], 4 * place);
  }
  const small = new OffscreenCanvas(side, side);
  small.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high"; // a few places, softly drawn over the whole image
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

for (const card of cards) {
  const tokens = [...card.querySelectorAll(".token")];
  // One stop of the tab key an image; from there arrows walk on.
  tokens.forEach((token, index) => token.setAttribute("tabindex", index ? -1 : 0));
  const focused = () => tokens.find((token) => token === document.activeElement) ?? null;
  for (const token of tokens) {
    token.addEventListener("mouseenter", () => look(card, token));
    token.addEventListener("mouseleave", () => look(card, focused()));
    token.addEventListener("focus", () => look(card, token));
    token.addEventListener("blur", () => look(card, null));
    token.addEventListener("click", () => token.focus());
  }
}

// The next word of the image one stands on; false where there is none.
function walk(step) {
  const card = document.activeElement.closest("#cards > li");
  const tokens = card ? [...card.querySelectorAll(".token")] : [];
  if (!tokens.length) return false;
  const here = tokens.indexOf(document.activeElement);
  tokens[Math.min(Math.max(here + step, 0), tokens.length - 1)].focus();
  return true;
}

const moves = { j: 1, ArrowRight: 1, ArrowDown: 1, k: -1, ArrowLeft: -1, ArrowUp: -1 };
document.addEventListener("keydown", (event) => {
  const control = event.target.closest("input, select, summary, .scroll");
  if (event.key === "Escape" && control === filter) {
    filter.value = "";
    filter.blur();
    arrange();
  } else if (control || event.ctrlKey || event.metaKey || event.altKey) {
    return;
  } else if (event.key === "/") {
    event.preventDefault();
    filter.focus();
  } else if (event.key in moves) {
    // Arrows scroll the page as ever until an image has been stepped onto with j or k.
    if (event.key.startsWith("Arrow") && !list.contains(document.activeElement)) return;
    event.preventDefault();
    if (/Left|Right/.test(event.key) && walk(moves[event.key])) return;
    move(moves[event.key]);
  }
});
order.addEventListener("change", arrange);
filter.addEventListener("input", arrange);
for (const part of document.querySelectorAll(".controls, .by-hand")) part.hidden = false; // what needs this script
arrange();
