// Mouse, touch and keys on the ranking page. order.js holds the ranking, saving.js sends it.

import { cards, list, moveTo, refresh, tiers, toggleTie } from "./order.js";
import { isPending, isUnsaved, save, saveAll, saveOnLeaving, sendWhatWasLeft, touch } from "./saving.js";

const task = document.getElementById("task"); // a fieldset: nothing in it can be used while it is disabled
const header = document.querySelector("header");
const comment = document.getElementById("comment");
const cardOf = (node) => node.closest?.(".card");

// A text of which something can be seen; the server asks the same, in answers.py.
const isBlank = (text) => !/[^\p{Z}\p{M}\p{Cc}\p{Cf}\p{Cs}\u115F\u1160\u2800\u3164\uFFA0]/u.test(text);

let attempted = "", confirmed = false;

// What stands against an action: a text, and where to mend it (nowhere for a question that is only to be confirmed).
function problem(action) {
  if (action === "flag" && isBlank(comment.value)) {
    return { text: "Not flagged: say what is wrong with the prompt, then flag it again.", field: comment };
  }
  if (action !== "submit") return {};
  const fields = [...list.querySelectorAll("[aria-required]")];
  fields.forEach((field) => field.setAttribute("aria-invalid", isBlank(field.value)));
  const empty = fields.filter((field) => isBlank(field.value));
  if (empty.length) {
    const letters = empty.map((field) => cardOf(field).dataset.letter).join(", ");
    return { text: `Not submitted: give a reason for ${letters}.`, field: empty[0] };
  }
  if (!confirmed && !task.dataset.standing && tiers().map((tier) => tier.join("=")).join(" ") === task.dataset.shown) {
    return { text: "One question: the order is as it was shown. If that is your ranking, submit again." };
  }
  return {};
}

function complain(text, isQuestion = false) {
  const box = document.getElementById("problem");
  box.textContent = text;
  box.classList.toggle("question", isQuestion);
}

// Once an answer was refused, the page follows what is still missing.
function changed() {
  touch();
  if (!attempted) return;
  const { text, field } = problem(attempted);
  complain(field ? text : "");
}

// Keeps the page as it is while `work`, a promise, sends what it shows: an edit or an undo meanwhile would be lost, or
// meet another state than the one on the screen. `leave` is called if the work resolves to true.
async function freezeDuring(work, leave) {
  const focused = document.activeElement;
  task.disabled = header.inert = true;
  if (await work) return leave();
  task.disabled = header.inert = false;
  focused.focus();
}

function finish(action) {
  if (task.disabled) return;
  const { text = "", field } = problem(action);
  complain(text, !field);
  if (text) {
    attempted = action;
    confirmed = !field;
    field?.focus();
    return;
  }
  freezeDuring(save(action), () => location.assign("/"));
}

// A text that is longer than its card can have the focus, so that keys scroll it, and says that it goes on.
function offerScrolling() {
  for (const body of list.querySelectorAll(".body")) {
    body.removeAttribute("tabindex"); // without what page.css adds to it
    if (body.scrollHeight > body.clientHeight) body.tabIndex = 0;
  }
}

function toggleRaw(card, button) {
  button.setAttribute("aria-pressed", card.classList.toggle("raw"));
  offerScrolling();
}

const ACTIONS = {
  up: (card) => moveTo(card, cards().indexOf(card) - 1),
  down: (card) => moveTo(card, cards().indexOf(card) + 1),
  tie: toggleTie,
  raw: toggleRaw,
  submit: () => finish("submit"),
  skip: () => finish("skip"),
  flag: () => finish("flag"),
};

task.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  // The second half of a double click is not meant for what comes after the first: a question, or the next task.
  if (!button || (event.detail > 1 && button.closest(".actions"))) return;
  ACTIONS[button.dataset.do](cardOf(button), button);
});
task.addEventListener("input", changed);
list.addEventListener("reorder", changed);

// Undo and log out act on the server at once: what was changed has to be there before.
header.addEventListener("submit", (event) => {
  if (!isPending()) return;
  event.preventDefault();
  freezeDuring(saveAll(), () => event.target.submit());
});

document.addEventListener("keydown", (event) => {
  if (task.disabled || event.isComposing) return; // keys that choose a character are the input method's
  const card = cardOf(event.target);
  const steps = event.altKey ? { ArrowUp: -1, ArrowDown: 1 } : { ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1 };
  const step = steps[event.key]; // Alt with left and right goes back and forth in the browser
  const isText = event.target.matches(".body"); // a long one, which keys scroll
  let handled = true;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.repeat || finish("submit");
  else if (step && event.altKey && card) moveTo(card, cards().indexOf(card) + step);
  else if (event.key === "Escape" && card) card.focus();
  else if (event.altKey || event.ctrlKey || event.metaKey) handled = false;
  else if (event.target !== card && event.target !== document.body && !isText) handled = false; // a field's own key
  else if (step && !isText) (cards()[card ? cards().indexOf(card) + step : 0] ?? card).focus();
  else if (!card) handled = false;
  else if (event.key === "=") toggleTie(card);
  else if (event.key === "Enter") card.querySelector("textarea, select").focus();
  else if (/^[1-9]$/.test(event.key)) moveTo(card, Number(event.key) - 1);
  else handled = false;
  if (handled) event.preventDefault();
});

document.addEventListener("visibilitychange", () => { if (document.hidden) saveOnLeaving(); });
window.addEventListener("pagehide", saveOnLeaving);
window.addEventListener("beforeunload", (event) => {
  saveOnLeaving();
  if (isUnsaved()) event.preventDefault();
});
window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // an old state, gone back to
window.addEventListener("resize", offerScrolling);

offerScrolling();
refresh();
if (await sendWhatWasLeft()) task.disabled = false;
else location.replace(location.pathname);
