// Active time: counts while the page is visible and somebody has moved, typed or scrolled within the last minute.

const IDLE_MS = 60000;
const clock = document.getElementById("time");
let total = Number(clock.dataset.seconds), untaken = 0, lastSign = performance.now(), lastTick = lastSign;

export function tick() {
  const now = performance.now();
  if (!document.hidden && now - lastSign < IDLE_MS) {
    untaken += (now - lastTick) / 1000;
    total += (now - lastTick) / 1000;
  }
  lastTick = now;
  clock.textContent = `${Math.floor(total / 60)}:${String(Math.floor(total % 60)).padStart(2, "0")}`;
}

export function untakenSeconds() {
  tick();
  return untaken;
}

// Seconds since the last call; the server adds up what the requests of a task carry.
export function takeSeconds() {
  tick();
  const taken = untaken;
  untaken = 0;
  return taken;
}

for (const sign of ["pointermove", "pointerdown", "keydown", "scroll"]) {
  document.addEventListener(sign, () => { lastSign = performance.now(); }, { passive: true, capture: true });
}
setInterval(tick, 1000);
tick();
