// Conversations in the browser's storage, one entry for each, so that two tabs never overwrite each other's.
const PREFIX = "llava.talk.";
const entries = () => Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));

function keep(key, text) {
  try {
    localStorage.setItem(key, text);
  } catch {
    const others = entries().filter((other) => other !== key);  // full: the oldest goes
    if (!others.length) return;
    const age = (other) => JSON.parse(localStorage.getItem(other)).time;
    localStorage.removeItem(others.reduce((old, other) => (age(other) < age(old) ? other : old)));
    keep(key, text);
  }
}

watch("value", () => {
  const { current, kept, gone } = props.value ?? {};
  if (current) sessionStorage.setItem("llava.current", current);
  if (gone) localStorage.removeItem(PREFIX + gone);
  if (kept) keep(PREFIX + kept.key, JSON.stringify(kept));
});
