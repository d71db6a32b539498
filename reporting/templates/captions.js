
"use strict";
// Order, filter and keyboard. Without script the page still shows every picture, in the order of the data.
const list = document.getElementById("cards");
const cards = [...list.children];
const order = document.getElementById("order");
const filter = document.getElementById("filter");
// The blind caption belongs to another picture: its words find nothing here.
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
    // Arrows scroll the page as ever until a picture has been stepped onto with j or k.
    if (event.key.startsWith("Arrow") && !list.contains(document.activeElement)) return;
    event.preventDefault();
    move(moves[event.key]);
  }
});
order.addEventListener("change", arrange);
filter.addEventListener("input", arrange);
document.querySelector(".controls").hidden = false;
arrange();
