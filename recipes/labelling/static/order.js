// The ranking on the screen: the order of the cards, and their `data-tied` marks (tied with the card above).

export const list = document.getElementById("cards");
export const cards = () => [...list.children];
export const announce = (text) => { document.getElementById("live").textContent = text; };

const isTied = (card) => card.hasAttribute("data-tied");
const setTied = (card, tied) => card.toggleAttribute("data-tied", tied);
const describe = (card) => `Response ${card.dataset.letter}: ${card.querySelector(".state").textContent}`;

export function tiers() {
  const result = [];
  for (const card of cards()) {
    if (isTied(card) && result.length) result.at(-1).push(card.dataset.id);
    else result.push([card.dataset.id]);
  }
  return result;
}

export function refresh() {
  const order = cards();
  let place = 1;
  for (const tier of tiers()) {
    const members = order.filter((card) => tier.includes(card.dataset.id));
    for (const card of members) {
      const others = members.filter((other) => other !== card).map((other) => other.dataset.letter);
      const tie = others.length ? `, tied with ${others.join(" and ")}` : "";
      card.querySelector(".rank").textContent = place;
      card.querySelector(".state").textContent = `rank ${place} of ${order.length}${tie}`;
      card.querySelector("[data-do=tie]").setAttribute("aria-pressed", isTied(card));
      card.querySelector("[data-do=tie]").disabled = card === order[0];
      card.querySelector("[data-do=up]").disabled = card === order[0];
      card.querySelector("[data-do=down]").disabled = card === order.at(-1);
    }
    place += tier.length;
  }
}

// A card leaves its tie when it is picked up, and joins one when it is put between two tied cards.
function lift(card) {
  const next = card.nextElementSibling;
  if (!isTied(card) && next) setTied(next, false);
  setTied(card, false);
}

function settle(card) {
  const next = card.nextElementSibling;
  if (next && isTied(next)) setTied(card === list.firstElementChild ? next : card, card !== list.firstElementChild);
  changed(card);
}

function changed(card) {
  refresh();
  announce(describe(card));
  list.dispatchEvent(new CustomEvent("reorder"));
}

export function moveTo(card, index) {
  const to = Math.max(0, Math.min(index, list.children.length - 1));
  if (cards().indexOf(card) === to) return announce(describe(card));
  const focused = document.activeElement;
  lift(card);
  list.insertBefore(card, cards().filter((other) => other !== card)[to] ?? null);
  settle(card);
  // Moving a node takes the focus from it; a button that has just been disabled cannot have it back.
  (card.contains(focused) && !focused.disabled ? focused : card).focus();
  card.scrollIntoView({ block: "nearest" });
}

export function toggleTie(card) {
  if (card === list.firstElementChild) return announce("The first response has none above it to tie with");
  setTied(card, !isTied(card));
  changed(card);
}

let before;
Sortable.create(list, {
  handle: ".bar", filter: "button", preventOnFilter: false, animation: 120, delay: 120, delayOnTouchOnly: true,
  fallbackOnBody: true, // the picture under the finger, a copy of the card, is no card of the list
  onStart: ({ item }) => {
    before = cards().map((card) => [card, isTied(card)]);
    lift(item);
  },
  onEnd: ({ item, oldIndex, newIndex }) => {
    if (oldIndex !== newIndex) return settle(item);
    before.forEach(([card, tied]) => setTied(card, tied));
    changed(item); // a draft that was saved meanwhile holds an order on the way
  },
});
