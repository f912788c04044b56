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

// Two images of each prompt side by side. Each side has a choice of a run, or of the base model, and a slider
// over the steps of a run.
const viewer = document.querySelector(".viewer"); // a page without one has tables of images alone
const table = viewer && document.querySelector("table.pictures");
const sides = table && table.tHead.rows[0].cells.length > 1 ? [0, 1].map((number) => viewerSide(number)) : [];

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function viewerSide(number) {
  const series = new Map(); // title -> columns of the table
  [...table.tHead.rows[0].cells].forEach((head, index) => {
    const title = head.dataset.series;
    if (!series.has(title)) series.set(title, []);
    series.get(title).push({ index, step: Number(head.dataset.step ?? -1) });
  });
  const titles = [...series.keys()];
  const choice = element("select", { ariaLabel: ["left", "right"][number] });
  choice.append(...titles.map((title) => element("option", { value: title, textContent: title })));
  const slider = element("input", { type: "range", min: 0, ariaLabel: "step" });
  const label = element("output");
  const figures = [...table.tBodies].map(() => element("figure"));
  const columns = () => series.get(choice.value);
  const side = {
    figures,
    choice,
    controls: element("div", { className: "controls" }, choice, slider, label),
    columns,
    step: () => columns()[slider.value].step,
    isAtEnd: () => Number(slider.value) === columns().length - 1,
    // The last of its steps that is not after this one, else the first.
    goTo(step) {
      slider.max = columns().length - 1;
      slider.value = Math.max(0, columns().findLastIndex((column) => column.step <= step));
      side.show();
    },
    show() {
      const { index, step } = columns()[slider.value];
      slider.hidden = columns().length < 2;
      label.textContent = step < 0 ? "" : `step ${step.toLocaleString("en-US")}`;
      figures.forEach((figure, row) => {
        const image = table.tBodies[row].rows[1].cells[index].querySelector("img");
        if (!image) {
          figure.replaceChildren(element("span", { className: "missing", textContent: "none" }));
          return;
        }
        const copy = image.cloneNode();
        copy.addEventListener("click", () => open(images.indexOf(image)));
        figure.replaceChildren(copy);
      });
    },
  };
  slider.addEventListener("input", () => {
    side.show();
    if (together.checked && canGoTogether()) other(side).goTo(side.step());
  });
  choice.addEventListener("change", () => {
    side.goTo(other(side).step() < 0 ? Infinity : other(side).step());
    together.parentElement.hidden = !canGoTogether();
  });
  choice.value = number === 0 ? titles[0] : titles.find((title) => series.get(title)[0].step >= 0) ?? titles[1];
  return side;
}

function other(side) {
  return sides[0] === side ? sides[1] : sides[0];
}

// Two runs, each with steps.
function canGoTogether() {
  return sides[0].choice.value !== sides[1].choice.value && sides.every((side) => side.columns().length > 1);
}

const together = element("input", { type: "checkbox", checked: true });
if (sides.length) {
  const rows = [...table.tBodies].map((body, row) => element("div", { className: "row" },
    element("p", { className: "prompt" }, ...body.querySelector("span").cloneNode(true).childNodes),
    ...sides.map((side) => side.figures[row])));
  viewer.append(
    element("div", { className: "row sliders" }, ...sides.map((side) => side.controls),
      element("label", {}, together, " both at one step")), ...rows);
  sides[0].goTo(-1);
  sides[1].goTo(Infinity);
  together.parentElement.hidden = !canGoTogether();
}

// The page of a run that goes on is loaded again, and then shown as it was left; browsers keep the place on it.
const KEPT = `report ${location.pathname}`;
const reload = document.querySelector("[data-reload]");

function keepView() {
  const view = {
    open: [...document.querySelectorAll("details")].map((each) => each.open),
    together: together.checked,
    sides: sides.map((side) => [side.choice.value, side.isAtEnd() ? null : side.step()]),
  };
  try { sessionStorage.setItem(KEPT, JSON.stringify(view)); } catch { /* the browser keeps nothing */ }
}

function restoreView() {
  let view = null;
  try {
    view = JSON.parse(sessionStorage.getItem(KEPT));
    sessionStorage.removeItem(KEPT);
  } catch { /* the browser keeps nothing */ }
  if (!view) return;
  document.querySelectorAll("details").forEach((each, number) => { each.open = Boolean(view.open[number]); });
  together.checked = view.together;
  sides.forEach((side, number) => {
    const [title, step] = view.sides[number] ?? [];
    if ([...side.choice.options].some((option) => option.value === title)) {
      side.choice.value = title;
      side.goTo(step ?? Infinity);
    }
  });
  if (sides.length) together.parentElement.hidden = !canGoTogether();
}

restoreView();
if (reload) {
  const loaded = performance.now();
  const loadAgain = () => {
    const isOld = performance.now() - loaded >= Number(reload.dataset.reload) * 1000;
    if (!isOld || document.hidden || document.querySelector("dialog[open], input:active")) return;
    keepView();
    location.reload();
  };
  setInterval(loadAgain, 1000);
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
