"use strict";
document.documentElement.classList.add("js");

async function unpacked(holder) {
  const bytes = Uint8Array.from(atob(holder.textContent), (c) => c.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).text();
}

// Views that can be switched: the packed ones come out when the first of them is asked for.
let chosen = null;
function markBlocks() {
  for (const block of document.querySelectorAll(".block"))
    block.setAttribute("aria-pressed", String(block.dataset.layer === chosen));
}
for (const box of document.querySelectorAll(".switch")) {
  const list = box.querySelector("select");
  if (!list) continue;
  const view = box.querySelector(".view");
  let store = null;
  box.show = async () => {
    store ??= unpacked(box.querySelector(".packed")).then(JSON.parse);
    const { parts, views } = await store;
    view.innerHTML = views[Number(list.value)].map((i) => parts[i]).join("");
    if (box.id === "layers-switch") chosen = list.selectedOptions[0].textContent;
    markBlocks();
  };
  list.addEventListener("change", box.show);
}

// A block of the row chooses its layer.
function choose(event) {
  const block = event.target.closest?.(".block");
  const box = document.getElementById("layers-switch");
  const list = box?.querySelector("select");
  if (!block || !list) return;
  if (event.type === "keydown" && event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  const at = [...list.options].findIndex((option) => option.textContent === block.dataset.layer);
  if (at < 0) return;
  list.selectedIndex = at;
  box.show();
}
document.addEventListener("click", choose);
document.addEventListener("keydown", choose);
markBlocks();

// The raw results come out when their fold is opened.
for (const fold of document.querySelectorAll("details.raw")) {
  fold.addEventListener("toggle", async () => {
    const holder = fold.querySelector(".packed");
    if (!holder) return;
    fold.querySelector("pre").textContent = await unpacked(holder);
    holder.remove();
  });
}
