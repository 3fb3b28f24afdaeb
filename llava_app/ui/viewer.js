// A sheet over the page: all models, or a picture opened large. A part of it that is marked with mouse or finger becomes a picture of the next question.
let marked = null;

function mark(area, from, to) {
  const bounds = area.querySelector("img").getBoundingClientRect();
  const inside = (value, low, size) => Math.min(1, Math.max(0, (value - low) / size));
  const across = [from.x, to.x].map((x) => inside(x, bounds.left, bounds.width)).sort((a, b) => a - b);
  const down = [from.y, to.y].map((y) => inside(y, bounds.top, bounds.height)).sort((a, b) => a - b);
  const frame = area.querySelector(".frame");
  frame.style.cssText = `left:${across[0] * 100}%;top:${down[0] * 100}%;`
    + `width:${(across[1] - across[0]) * 100}%;height:${(down[1] - down[0]) * 100}%`;
  frame.hidden = false;
  marked = [across[0], down[0], across[1], down[1]];
  element.querySelector("[data-do=part]").disabled = across[1] - across[0] < 0.02 || down[1] - down[0] < 0.02;
}

element.addEventListener("pointerdown", (event) => {
  const area = event.target.closest(".area");
  if (!area) return;
  event.preventDefault();
  area.setPointerCapture(event.pointerId);
  const from = { x: event.clientX, y: event.clientY };
  area.onpointermove = (move) => mark(area, from, { x: move.clientX, y: move.clientY });
  area.onpointerup = () => (area.onpointermove = null);
});

element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-do]");
  if (!chosen) return;
  const { turn, picture } = chosen.dataset;
  if (chosen.dataset.do === "part") trigger("input", { turn: Number(turn), picture: Number(picture), part: marked });
  if (chosen.dataset.do === "use") trigger("select", { model: chosen.dataset.model });
  element.querySelector("dialog").close();
});

watch("value", () => {
  marked = null;
  const dialog = element.querySelector("dialog");
  if (!props.value || !dialog) return;
  dialog.addEventListener("close", () => (props.value = ""));
  dialog.showModal();
});
