// The buttons in the conversation and the pictures in it. What they do goes to the server as an event of this component.
const editor = element.querySelector("dialog");
const text = editor.querySelector("textarea");
const busy = () => document.querySelector("#box .stop-button") !== null;
let save = () => {};

function write(title, begun, then) {
  editor.querySelector("h2").textContent = title;
  text.value = begun;
  text.setAttribute("aria-label", title);
  save = then;
  editor.showModal();
  text.focus();
}

async function copy(button, value) {
  await navigator.clipboard.writeText(value);
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

const acts = {
  copy: (button) => copy(button, button.dataset.text),
  edit: (button, turn) => write("Edit the question", button.dataset.text, (text) => trigger("edit", { turn, text })),
  correct: (button, turn) => write("Write the right answer", button.dataset.text, (text) => trigger("submit", { turn, text })),
  up: (button, turn) => trigger("like", { turn, vote: "up" }),
  down: (button, turn) => trigger("like", { turn, vote: "down" }),
  view: (button, turn) => trigger("select", { turn, picture: Number(button.dataset.picture) }),
};

// Every question and answer, as the buttons beside them hold them.
function everything() {
  const parts = document.querySelectorAll("#conversation :is([data-act=edit], [data-act=copy])");
  return [...parts].map(({ dataset }) => `${dataset.act === "edit" ? "Question" : "Answer"}: ${dataset.text}`).join("\n\n");
}

document.addEventListener("click", (event) => {
  const all = event.target.closest?.("#copy-all");
  if (all) copy(all, everything());
});

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("#conversation [data-act]");
  if (!button || (busy() && button.dataset.act !== "copy")) return;
  acts[button.dataset.act](button, Number(button.dataset.turn));
});

editor.addEventListener("close", () => {
  if (editor.returnValue === "save") save(text.value);
  editor.returnValue = "";
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    editor.close("save");
  }
});

// A browser that takes longer to draw a piece of an answer than the next one takes to come falls ever further behind, and
// Stop with it. Its own clock tells.
const TICK = 250; // ms
let due = performance.now() + TICK;
setInterval(() => {
  const late = performance.now() - due;
  due += late + TICK;
  if (late > TICK && busy() && !document.hidden) trigger("pause", { late: late / 1000 });
}, TICK);
