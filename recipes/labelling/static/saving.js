// Drafts and answers on their way to the server, one request at a time and in order. A request that may not have
// arrived is repeated with the same key, which the server stores once. The revision tells the server what this page was
// based on, so that two tabs cannot overwrite each other.

import { takeSeconds, untakenSeconds } from "./clock.js";
import { cards, tiers } from "./order.js";

const RETRY_MS = 3000;
const DRAFT_MS = 700;
const KEEPALIVE_MAX = 60000; // browsers let 64 kB outlive a closed tab

const task = document.getElementById("task");
let revision = Number(task.dataset.revision);
let dirty = false; // changed since the last snapshot
let underWay = false; // a snapshot has been sent and not acknowledged
let stopped = false, draftTimer = null, queue = Promise.resolve();

const status = (text) => { document.getElementById("status").textContent = text; };
export const complain = (text) => { document.getElementById("alert").textContent = text; };
export const isUnsaved = () => (dirty || underWay) && !stopped;

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
    tiers: tiers(),
    reviews,
    comment: document.getElementById("comment").value,
    key: Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join(""),
    revision,
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
export function save(action) {
  clearTimeout(draftTimer);
  queue = queue.then(() => {
    if (stopped || (action === "draft" && !dirty)) return false;
    dirty = false;
    return deliver(JSON.stringify(snapshot(action)), action !== "draft");
  });
  return queue;
}

// Also keeps the time somebody has spent reading without a change; an answer already given is left alone.
export function saveOnLeaving() {
  if (!task.dataset.standing && untakenSeconds() >= 1) dirty = true;
  save("draft");
}

async function deliver(body, isFinal) {
  underWay = true;
  for (;;) {
    const { ok, reply, retry } = await post(body);
    underWay = retry;
    if (ok) {
      revision = reply.revision;
      stopped = isFinal;
      complain("");
      if (!dirty) status(`Saved at ${new Date().toLocaleTimeString()}`);
      return true;
    }
    status("");
    complain(retry ? `${reply.error}. Trying again; keep this page open.` : reply.error);
    if (!retry) {
      dirty = true;
      return false;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function post(body) {
  try {
    const response = await fetch("/api/answer", {
      method: "POST",
      body,
      headers: { "Content-Type": "application/json" },
      keepalive: body.length < KEEPALIVE_MAX,
    });
    stopped = response.status === 409 || response.status === 404; // the task has moved on without this page
    const retry = response.status === 401 || response.status >= 500;
    return { ok: response.ok, reply: await response.json(), retry };
  } catch {
    return { ok: false, reply: { error: "NOT saved: the server does not answer" }, retry: true };
  }
}
