"use strict";
const all = (what) => [...document.querySelectorAll(what)];

// One score at a time; without this script all of them are there.
const choice = document.getElementById("score");
if (choice) {
  const show = () => {
    for (const own of all("[data-score]")) {
      own.classList.toggle("none", own.dataset.score !== choice.value);
    }
  };
  choice.parentElement.classList.remove("none");
  choice.addEventListener("change", show);
  show();
}

// A draw is the same one in all charts and in the table.
document.addEventListener("pointerover", (event) => {
  const own = event.target.closest("[data-draw]");
  for (const other of all("[data-draw].on")) other.classList.remove("on");
  if (!own) return;
  for (const same of all(`[data-draw="${own.dataset.draw}"]`)) same.classList.add("on");
});

const button = document.getElementById("copy");
const recipe = document.getElementById("recipe");
button.classList.remove("none");
button.addEventListener("click", async () => {
  let done = true;
  try {
    await navigator.clipboard.writeText(recipe.textContent);
  } catch {
    getSelection().selectAllChildren(recipe);
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Marked; copy it with the keyboard";
});
