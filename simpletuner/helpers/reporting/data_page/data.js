"use strict";

// The cards that a text, a finding and an order select.
const form = document.getElementById("filter");
if (form) {
  const box = document.querySelector(".cards");
  const cards = [...box.children];
  const texts = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const places = new Map(cards.map((card, place) => [card, place]));
  const orders = {
    "": (first, second) => places.get(first) - places.get(second),
    sharpness: (first, second) => first.dataset.sharpness - second.dataset.sharpness,
    name: (first, second) => first.dataset.name.localeCompare(second.dataset.name),
  };

  const apply = () => {
    const { text, kind, order } = form.elements;
    const wanted = text.value.toLowerCase();
    let number = 0;
    for (const card of cards) {
      const isKind = !kind.value || card.dataset.kinds.split(" ").includes(kind.value);
      card.hidden = !isKind || !texts.get(card).includes(wanted);
      number += !card.hidden;
    }
    form.querySelector("output").textContent = `${number.toLocaleString("en-US")} shown`;
    return orders[order.value];
  };

  form.addEventListener("input", apply);
  form.elements.order.addEventListener("change", () => box.append(...[...cards].sort(apply())));
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const link of document.querySelectorAll("a[data-kind]")) {
    link.addEventListener("click", () => {
      form.elements.text.value = "";
      form.elements.kind.value = link.dataset.kind;
      apply();
    });
  }
  apply();
}
