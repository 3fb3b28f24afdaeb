// Runs once, when the page is there. A picture may be dropped or pasted anywhere: it is handed to the box.
const BOXES = "#box, #compare-box";
const box = () => [...document.querySelectorAll(BOXES)].find((one) => one.offsetParent).querySelector("[role=group]");
let dragEnd;

document.querySelector("#panel .toggle-button")?.setAttribute("aria-label", "Conversations");

document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("dragging-file");
  clearTimeout(dragEnd);
  dragEnd = setTimeout(() => document.body.classList.remove("dragging-file"), 200);
});

document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length || event.target.closest(BOXES)) return;
  event.preventDefault();
  box().dispatchEvent(new DragEvent("drop", { dataTransfer: event.dataTransfer, bubbles: true, cancelable: true }));
});

document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length || event.target.closest(BOXES)) return;
  const copy = new ClipboardEvent("paste", { clipboardData: event.clipboardData, bubbles: true, cancelable: true });
  box().querySelector("textarea").dispatchEvent(copy);
});

// The open settings lie over the conversation: they close for whoever turns to something else, and at Escape.
const opened = () => document.querySelector("#settings > .label-wrap.open");
const leave = (event) => event.target.closest?.("#settings") || opened()?.click();

document.addEventListener("pointerdown", leave);
document.addEventListener("focusin", leave);
document.addEventListener("keydown", (event) => event.key === "Escape" && opened()?.click());
