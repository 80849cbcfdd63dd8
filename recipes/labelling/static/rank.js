// Mouse, touch and keys on the ranking page. order.js holds the ranking, saving.js sends it.

import { tick } from "./clock.js";
import { cards, list, moveTo, refresh, tiers, toggleTie } from "./order.js";
import { complain, isUnsaved, save, saveOnLeaving, touch } from "./saving.js";

const task = document.getElementById("task");
const comment = document.getElementById("comment");
const shown = task.dataset.shown.trim();
const cardOf = (node) => node.closest?.(".card");

let warned = false, finishing = false;

function problem(action) {
  if (action === "flag" && !comment.value.trim()) {
    comment.focus();
    return "Not flagged: say what is wrong with the prompt, then flag it again.";
  }
  if (action !== "submit") return "";
  const fields = [...list.querySelectorAll("[aria-required]")];
  fields.forEach((field) => field.setAttribute("aria-invalid", !field.value.trim()));
  const empty = fields.filter((field) => !field.value.trim());
  if (empty.length) {
    empty[0].focus();
    return `Not submitted: give a reason for ${empty.map((field) => cardOf(field).dataset.letter).join(", ")}.`;
  }
  if (!warned && !task.dataset.standing && tiers().map((tier) => tier.join("=")).join(" ") === shown) {
    warned = true;
    return "Not submitted yet: the order is as it was shown. If that is your ranking, submit again.";
  }
  return "";
}

async function finish(action) {
  if (finishing) return;
  const text = problem(action);
  complain(text);
  if (text) return;
  finishing = true;
  const buttons = task.querySelectorAll(".actions button");
  buttons.forEach((button) => { button.disabled = true; });
  if (await save(action)) return location.assign("/");
  buttons.forEach((button) => { button.disabled = false; });
  finishing = false;
}

function toggleText(card, button) {
  const open = card.classList.toggle("open");
  button.setAttribute("aria-expanded", open);
  button.textContent = open ? "Show less" : "Show all";
}

const ACTIONS = {
  up: (card) => moveTo(card, cards().indexOf(card) - 1),
  down: (card) => moveTo(card, cards().indexOf(card) + 1),
  tie: toggleTie,
  more: toggleText,
  submit: () => finish("submit"),
  skip: () => finish("skip"),
  flag: () => finish("flag"),
};

task.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button) ACTIONS[button.dataset.do](cardOf(button), button);
});
task.addEventListener("input", touch);
list.addEventListener("reorder", touch);

document.addEventListener("keydown", (event) => {
  const card = cardOf(event.target);
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  let handled = true;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish("submit");
  else if (step && event.altKey && card) moveTo(card, cards().indexOf(card) + step);
  else if (event.key === "Escape" && card) card.focus();
  else if (event.altKey || event.ctrlKey || event.metaKey) handled = false;
  else if (event.target !== card && event.target !== document.body) handled = false; // a field's own key
  else if (step) (cards()[card ? cards().indexOf(card) + step : 0] ?? card).focus();
  else if (!card) handled = false;
  else if (event.key === "=") toggleTie(card);
  else if (event.key === "Enter") card.querySelector("textarea, select").focus();
  else if (/^[1-9]$/.test(event.key)) moveTo(card, Number(event.key) - 1);
  else handled = false;
  if (handled) event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  tick();
  if (document.hidden) saveOnLeaving();
});
window.addEventListener("pagehide", saveOnLeaving);
window.addEventListener("beforeunload", (event) => { if (isUnsaved()) event.preventDefault(); });

for (const card of cards()) {
  const text = card.querySelector(".text");
  card.querySelector(".more").hidden = text.scrollHeight <= text.clientHeight + 1;
}
refresh();
