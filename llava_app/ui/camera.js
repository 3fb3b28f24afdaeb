// The camera as a source of pictures: what is taken goes into the box as if it had been dropped there.
const sheet = element.querySelector("dialog");
const video = sheet.querySelector("video");
const take = sheet.querySelector("[data-do=take]");
const told = sheet.querySelector("p");

async function open() {
  told.textContent = "The camera starts …";
  sheet.showModal();
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (!sheet.open) return stop();
    await video.play();
    told.textContent = "";
    take.disabled = false;
  } catch {
    told.textContent = "No camera can be used here. Allow it in the browser, or choose a file.";
  }
}

function stop() {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  take.disabled = true;
}

async function picture() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const taken = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([taken], "camera.png", { type: "image/png" }));
  const drop = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
  document.querySelector("#box [role=group]").dispatchEvent(drop);
}

document.addEventListener("click", (event) => event.target.closest?.("#camera-open") && open());
sheet.addEventListener("close", stop);
sheet.addEventListener("click", async (event) => {
  const chosen = event.target.closest("[data-do]");
  if (!chosen) return;
  if (chosen.dataset.do === "take") await picture();
  sheet.close();
});
