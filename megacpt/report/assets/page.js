"use strict";
{
  const tip = document.getElementById("tip");
  const show = (svg, number, x, y) => {
    const places = svg.dataset.px.split(" ").map(Number);
    const guide = svg.querySelector(".guide");
    guide.setAttribute("x1", places[number]);
    guide.setAttribute("x2", places[number]);
    svg.tips ??= JSON.parse(svg.closest("figure").querySelector("script").textContent);
    const [where, rows] = svg.tips[number];
    tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: where }));
    for (const [colour, name, value] of rows) {
      const row = document.createElement("div");
      const dot = Object.assign(document.createElement("span"), { className: `dot ${colour}` });
      row.append(dot, `${name}: ${value}`);
      tip.append(row);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16)}px`;
    tip.style.top = `${Math.min(Math.max(4, y + 14), innerHeight - box.height - 4)}px`;
  };
  const hide = (svg) => {
    tip.hidden = true;
    for (const end of ["x1", "x2"]) svg.querySelector(".guide").setAttribute(end, -9);
  };
  for (const svg of document.querySelectorAll("svg.chart[data-px]")) {
    if (!svg.dataset.px) continue;
    const places = svg.dataset.px.split(" ").map(Number);
    let at = 0;
    const nearest = (x) => places.reduce((best, place, n) => (Math.abs(place - x) < Math.abs(places[best] - x) ? n : best), 0);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      at = nearest(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width);
      show(svg, at, event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      at = Math.min(places.length - 1, Math.max(0, at + step));
      const box = svg.getBoundingClientRect();
      show(svg, at, box.left + (places[at] / svg.viewBox.baseVal.width) * box.width, box.top + box.height / 3);
    });
  }
}
