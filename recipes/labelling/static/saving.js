// Drafts and answers on their way to the server, one request at a time and in order.
//
// They wait in an outbox that outlives the page (not the tab): what a page could not send before it was reloaded or left
// is sent by the next one. A request that may have arrived is repeated with the same key, which the server stores once.
// The revision tells the server what a page was based on, so that two tabs cannot overwrite each other.

import { addSeconds, takeSeconds, untakenSeconds } from "./clock.js";
import { cards, tiers } from "./order.js";

const RETRY_MS = 3000;
const TIMEOUT_MS = 20000;
const DRAFT_MS = 700;
const KEEPALIVE_BYTES = 60000; // browsers let 64 kB outlive a closed page, and refuse to send more that way

const task = document.getElementById("task");
const OUTBOX = `outbox ${task.dataset.account}`;
const REVISION = `revision ${task.dataset.account} ${task.dataset.prompt}`;
const READING = `reading ${task.dataset.account} ${task.dataset.prompt}`; // seconds that no request has carried
const outbox = kept(OUTBOX) ?? [];
let revision = Number(task.dataset.revision);
let dirty = false; // changed since the last snapshot
let stopped = false; // nothing can be saved from this page any more
let draftTimer = null, sending = null;

// What outlives the page. There may be no room for it, or it may not be allowed: then it lives as long as the page.
function keep(name, value, storage = "sessionStorage") {
  try {
    if (value) window[storage].setItem(name, JSON.stringify(value));
    else window[storage].removeItem(name);
  } catch { /* as said */ }
}

function kept(name, storage = "sessionStorage") {
  try {
    return JSON.parse(window[storage].getItem(name));
  } catch {
    return null;
  }
}

const trouble = document.getElementById("trouble"); // with saving; its text stays until something was saved
const status = (text) => { document.getElementById("status").textContent = text; };
const fitsKeepalive = (text) => new TextEncoder().encode(text).length <= KEEPALIVE_BYTES;

// Whether the server had stored more for this tab than it rendered: the page before may have saved, and heard of it,
// while this one was on its way. Asked once, so that no page loads for ever.
function isOutdated() {
  const known = kept(REVISION) ?? 0;
  keep(REVISION, 0);
  return known > revision;
}

// Whether something is not on the server yet, and still can get there.
export const isPending = () => !stopped && (dirty || outbox.length > 0);

// Whether leaving the page now may lose something.
export function isUnsaved() {
  const isSentOnLeaving = outbox.length === 1 && trouble.textContent === "" && fitsKeepalive(JSON.stringify(outbox[0]));
  return isPending() && (dirty || !isSentOnLeaving);
}

function snapshot(action) {
  const reviews = {};
  for (const card of cards()) {
    const rating = card.querySelector("[name=rating]").value;
    reviews[card.dataset.id] = {
      justification: card.querySelector("[name=justification]")?.value ?? "",
      rating: rating ? Number(rating) : null,
      flags: [...card.querySelectorAll("[name=flag]:checked")].map((box) => box.value),
    };
  }
  const random = crypto.getRandomValues(new Uint8Array(16));
  return {
    prompt_id: task.dataset.prompt,
    action,
    answer: { tiers: tiers(), reviews, comment: document.getElementById("comment").value },
    key: Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join(""),
    revision: null, // the one before it, once that is known
    active_seconds: takeSeconds(),
    client_time: Date.now() / 1000,
  };
}

export function touch() {
  dirty = true;
  status("");
  clearTimeout(draftTimer);
  draftTimer = setTimeout(() => save("draft"), DRAFT_MS);
}

// Resolves to true once the server has stored it.
export async function save(action) {
  clearTimeout(draftTimer);
  if (stopped || (action === "draft" && !dirty)) return false;
  dirty = false;
  const body = snapshot(action);
  keep(READING, 0, "localStorage"); // they are in there
  if (outbox.length > 1 && outbox.at(-1).action === "draft") { // one that was not under way yet
    body.active_seconds += outbox.pop().active_seconds;
  }
  outbox.push(body);
  keep(OUTBOX, outbox);
  return (await send()).has(body.key);
}

// Resolves to true once the server has all that was changed.
export async function saveAll() {
  await (dirty ? save("draft") : send());
  return trouble.textContent === "";
}

// Before the page is left: what has changed, and the time spent since, which the next change of this task carries.
export function saveOnLeaving() {
  if (dirty) save("draft");
  if (!stopped) keep(READING, untakenSeconds(), "localStorage");
}

// Resolves to the keys that were stored, once the outbox is empty.
function send() {
  sending ??= emptyOutbox().finally(() => { sending = null; });
  return sending;
}

async function emptyOutbox() {
  const stored = new Set();
  while (outbox.length) {
    const body = outbox[0];
    const isHere = body.prompt_id === task.dataset.prompt;
    body.revision ??= revision;
    keep(OUTBOX, outbox);
    status("Saving …");
    const { ok, reply, retry } = await post(body);
    if (retry) {
      status("");
      trouble.textContent = `${reply.error}. Trying again; keep this page open.`;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      continue;
    }
    outbox.shift();
    if (ok) {
      stored.add(body.key);
      if (isHere) {
        revision = Math.max(revision, reply.revision);
        keep(REVISION, revision);
      }
      if (outbox.length) outbox[0].revision = reply.revision; // of the same task: a page sends first what another left
      stopped ||= isHere && body.action !== "draft";
    } else {
      outbox.length = 0; // what follows builds on it
      dirty = isHere;
    }
    keep(OUTBOX, outbox);
    trouble.textContent = ok ? "" : reply.error;
    status(ok && !dirty ? `Draft saved at ${new Date().toLocaleTimeString()}` : "");
  }
  return stored;
}

async function post(answer) {
  const body = JSON.stringify(answer);
  try {
    const response = await fetch("/api/answer", {
      method: "POST",
      body,
      headers: { "Content-Type": "application/json", "X-Account": task.dataset.account },
      keepalive: fitsKeepalive(body),
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    const retry = response.status === 401 || response.status >= 500;
    const moved = response.status === 409 || response.status === 404; // the task has moved on without this page
    stopped ||= moved && answer.prompt_id === task.dataset.prompt;
    return { ok: response.ok, reply: await response.json(), retry };
  } catch {
    return { ok: false, reply: { error: "NOT saved: the server does not answer" }, retry: true };
  }
}

// Sends what the page before could not wait for, and resolves to whether this page still shows what is stored.
export async function sendWhatWasLeft() {
  const rendered = revision, isOld = isOutdated();
  addSeconds(kept(READING, "localStorage") ?? 0);
  if (!outbox.length) return !isOld;
  await send();
  stopped = dirty = false; // a refusal was of what the page before was based on; this one is new
  return revision === rendered;
}
