// The read-out of a chart under the pointer. The page is complete without it.
"use strict";
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, right, top, bottom] = chart.box;
  const [x0, x1] = chart.range;
  const readout = svg.closest("figure").querySelector("output");
  const make = (name, attributes) => {
    const node = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.style.display = "none";
    return svg.appendChild(node);
  };
  const cursor = make("line", { class: "cursor", y1: top, y2: bottom });
  const dots = chart.series.map((s) => make("circle", { class: "s" + s.c, r: 4 }));
  const place = (x) => left + (x1 > x0 ? (x - x0) / (x1 - x0) : 0.5) * (right - left);
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };
  const short = (v) => Math.abs(v) >= 1e4 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(5));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = x0 + Math.min(1, Math.max(0, (at - left) / (right - left))) * (x1 - x0);
    const parts = chart.series.map((s, i) => {
      const n = nearest(s.x, x);
      dots[i].setAttribute("cx", place(s.x[n]));
      dots[i].setAttribute("cy", s.py[n]);
      dots[i].style.display = "";
      return s.label + " " + short(s.y[n]);
    });
    const first = chart.series[0];
    const shown = first.x[nearest(first.x, x)];
    cursor.setAttribute("x1", place(shown));
    cursor.setAttribute("x2", place(shown));
    cursor.style.display = "";
    readout.textContent = chart.x + " " + shown.toLocaleString("en") + "  ·  " + parts.join("  ·  ");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.display = "none";
    for (const dot of dots) dot.style.display = "none";
    readout.textContent = "";
  });
}
for (const block of document.querySelectorAll("details")) {
  addEventListener("beforeprint", () => { block.open = true; });
}
