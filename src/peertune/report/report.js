"use strict";
// Tooltips only: without this script the page shows the same charts. Texts are set as text, never as markup.
(() => {
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const place = (event) => {
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const right = event.clientX + 18 + box.width < innerWidth;
    const x = right ? event.clientX + 18 : Math.max(4, event.clientX - 18 - box.width);
    const y = Math.min(Math.max(4, event.clientY - box.height / 2), Math.max(4, innerHeight - box.height - 4));
    tip.style.transform = `translate(${x}px, ${y}px)`;
  };
  const row = (name, text, color) => {
    const line = document.createElement("div");
    const key = document.createElement("i");
    const value = document.createElement("b");
    key.style.background = color;
    value.textContent = text;
    line.append(key, name, value);
    return line;
  };

  for (const plot of document.querySelectorAll(".plot")) {
    const points = JSON.parse(plot.dataset.points);
    const cross = document.createElement("div");
    cross.className = "cross";
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width;
      let best = 0;
      points.at.forEach((a, i) => { if (Math.abs(a - at) < Math.abs(points.at[best] - at)) best = i; });
      const title = plot.parentElement.parentElement.querySelector(".x-title").textContent;
      tip.replaceChildren(`${title} ${points.label[best]}`, ...points.rows.map((r) => row(r.name, r.text[best], r.color)));
      cross.style.left = `${points.at[best] * 100}%`;
      plot.append(cross);
      place(event);
    });
    plot.addEventListener("pointerleave", () => { cross.remove(); hide(); });
  }

  for (const part of document.querySelectorAll("[data-tip]")) {
    part.addEventListener("pointermove", (event) => { tip.textContent = part.dataset.tip; place(event); });
    part.addEventListener("pointerleave", hide);
  }

  for (const node of document.querySelectorAll("[data-node]")) {
    const graph = node.closest("svg");
    const mine = graph.querySelectorAll(`[data-a="${node.dataset.node}"], [data-b="${node.dataset.node}"]`);
    node.addEventListener("pointerenter", () => { graph.classList.add("focus"); mine.forEach((e) => e.classList.add("on")); });
    node.addEventListener("pointerleave", () => { graph.classList.remove("focus"); mine.forEach((e) => e.classList.remove("on")); });
  }
})();
