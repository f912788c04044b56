"use strict";

function shown(value) {
  if (value === null) return "-";
  if (Math.abs(value) >= 10000 || Number.isInteger(value)) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

// A chart: its legend shows the values at the pointer, else those of the last step.
for (const chart of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot");
  const field = chart.querySelector(".field");
  const cursor = chart.querySelector(".cursor");
  const values = [...chart.querySelectorAll(".key b")];
  const resting = values.map((value) => value.textContent);
  const span = data.x[data.x.length - 1] - data.x[0] || 1;
  let place = data.x.length - 1;

  const show = (index) => {
    place = Math.min(Math.max(index, 0), data.x.length - 1);
    cursor.style.display = "block";
    cursor.style.left = `${((data.x[place] - data.x[0]) / span) * 100}%`;
    data.y.forEach((curve, number) => { values[number].textContent = shown(curve[place]); });
    values[values.length - 1].textContent = shown(data.x[place]);
  };
  const rest = () => {
    cursor.style.display = "none";
    values.forEach((value, number) => { value.textContent = resting[number]; });
  };

  field.addEventListener("pointermove", (event) => {
    const box = field.getBoundingClientRect();
    const step = data.x[0] + ((event.clientX - box.left) / box.width) * span;
    let low = 0;
    let high = data.x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (data.x[middle] < step) low = middle + 1; else high = middle;
    }
    show(low > 0 && step - data.x[low - 1] < data.x[low] - step ? low - 1 : low);
  });
  field.addEventListener("pointerleave", rest);
  plot.addEventListener("blur", rest);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { show(place + move); event.preventDefault(); }
  });
}

// An image, enlarged; the arrow keys show the previous and next one.
const images = [...document.querySelectorAll(".pictures img")];
const dialog = document.createElement("dialog");
const large = document.createElement("img");
const description = document.createElement("p");
dialog.append(large, description);
document.body.append(dialog);
let current = 0;
const open = (index) => {
  current = (index + images.length) % images.length;
  large.src = images[current].src;
  large.alt = images[current].alt;
  large.className = images[current].className;
  description.textContent = images[current].alt;
  if (!dialog.open) dialog.showModal();
};
images.forEach((image, index) => image.addEventListener("click", () => open(index)));
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (move) open(current + move);
});

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
    }
  });
}
