"use strict";
// Order, filter, keyboard and attention maps. Without JavaScript the page still shows every image, in the order of the data set.
const list = document.getElementById("cards");
const cards = [...list.children];
const order = document.getElementById("order");
const filter = document.getElementById("filter");
const falseOnly = document.getElementById("false-only"); // null unless the truth about the images is known
// Not the shuffled caption, which belongs to another image.
const textOf = (card) => [...card.querySelectorAll(".caption, .references, .id")].map((part) => part.textContent).join(" ");
const words = new Map(cards.map((card) => [card, textOf(card).toLowerCase()]));

const byCider = (sign) => (one, other) => sign * (Number(one.dataset.cider) - Number(other.dataset.cider));
const orders = {
  data: () => cards,
  worst: () => [...cards].sort(byCider(1)),
  best: () => [...cards].sort(byCider(-1)),
  doubtful: () => [...cards].sort((one, other) => Number(one.dataset.confidence) - Number(other.dataset.confidence)),
  false: () => [...cards].sort((one, other) => Number(one.dataset.true) - Number(other.dataset.true)),
};

function arrange() {
  list.append(...orders[order.value]());
  const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const excluded = falseOnly?.checked && card.dataset.true === "1";
    card.hidden = excluded || !wanted.every((word) => words.get(card).includes(word));
    shown += card.hidden ? 0 : 1;
  }
  document.getElementById("count").textContent = `${shown} of ${cards.length}`;
  document.getElementById("nothing").hidden = shown > 0;
}

function move(step) {
  const visible = [...list.children].filter((card) => !card.hidden);
  const current = visible.findIndex((card) => card.contains(document.activeElement));
  const next = current < 0 ? 0 : Math.min(Math.max(current + step, 0), visible.length - 1);
  if (visible.length) visible[next].firstElementChild.focus();
}

// Darken the image where the model does not attend at a token, and show its probability; null restores the image.
function showAttention(card, token) {
  const [canvas, info] = [card.querySelector("canvas"), card.querySelector(".token-info")];
  info.textContent = token ? `${token.textContent.trim()}  ${token.dataset.probability}${token.matches("mark") ? ", false" : ""}` : "";
  if (!canvas) return;
  canvas.hidden = !token;
  if (!token) return;
  const side = Number(canvas.dataset.side);
  const numCells = side * side;
  const start = [...card.querySelectorAll("article .token")].indexOf(token) * numCells;
  const bytes = atob(canvas.dataset.attention);
  const image = new ImageData(side, side);
  for (let cell = 0; cell < numCells; cell++) {
    image.data.set([8, 8, 20, 0.78 * (255 - bytes.charCodeAt(start + cell))], 4 * cell);
  }
  const small = new OffscreenCanvas(side, side);
  small.getContext("2d").putImageData(image, 0, 0);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high"; // a few cells, interpolated over the whole image
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

for (const card of cards) {
  const tokens = [...card.querySelectorAll(".token")];
  // One tab stop per image; arrow keys move between its tokens.
  tokens.forEach((token, index) => token.setAttribute("tabindex", index ? -1 : 0));
  const focused = () => tokens.find((token) => token === document.activeElement) ?? null;
  for (const token of tokens) {
    token.addEventListener("mouseenter", () => showAttention(card, token));
    token.addEventListener("mouseleave", () => showAttention(card, focused()));
    token.addEventListener("focus", () => showAttention(card, token));
    token.addEventListener("blur", () => showAttention(card, null));
    token.addEventListener("click", () => token.focus());
  }
}

// Focus the next token of the focused image; false if it has none.
function moveToken(step) {
  const card = document.activeElement.closest("#cards > li");
  const tokens = card ? [...card.querySelectorAll(".token")] : [];
  if (!tokens.length) return false;
  const current = tokens.indexOf(document.activeElement);
  tokens[Math.min(Math.max(current + step, 0), tokens.length - 1)].focus();
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
    // Arrow keys scroll the page as usual until an image is focused with j or k.
    if (event.key.startsWith("Arrow") && !list.contains(document.activeElement)) return;
    event.preventDefault();
    if (/Left|Right/.test(event.key) && moveToken(moves[event.key])) return;
    move(moves[event.key]);
  }
});
order.addEventListener("change", arrange);
filter.addEventListener("input", arrange);
falseOnly?.addEventListener("change", arrange);
for (const part of document.querySelectorAll(".controls, .needs-script")) part.hidden = false;
arrange();
