// Active time: counts while the page is visible and somebody has moved, typed or scrolled within the last minute.

const IDLE_MS = 60000;
const clock = document.getElementById("time");
let total = Number(clock.dataset.seconds), untaken = 0, lastSign = performance.now(), lastCount = lastSign;

export function addSeconds(seconds) {
  untaken += seconds;
  total += seconds;
}

// Seconds that no request of this task has carried to the server yet.
export function untakenSeconds() {
  const now = performance.now();
  if (!document.hidden && now - lastSign < IDLE_MS) addSeconds((now - lastCount) / 1000);
  lastCount = now;
  return untaken;
}

export function takeSeconds() {
  const taken = untakenSeconds();
  untaken = 0;
  return taken;
}

function tick() {
  untakenSeconds();
  clock.textContent = `${Math.floor(total / 60)}:${String(Math.floor(total % 60)).padStart(2, "0")}`;
}

for (const sign of ["pointermove", "pointerdown", "keydown", "scroll"]) {
  document.addEventListener(sign, () => {
    untakenSeconds(); // before: a computer that slept did not count, and its first sign would count the night
    lastSign = performance.now();
  }, { passive: true, capture: true });
}
setInterval(tick, 1000);
tick();
