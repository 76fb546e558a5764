"use strict";
// Reads values off the charts, and opens what is folded before printing. All else works without.

// The points (step, height in the drawing) of a line.
function pointsOf(path) {
  path.points ??= path.getAttribute("d").split(/[ML]/).slice(1).map(pair => pair.split(",").map(Number));
  return path.points;
}

// The value at a height of the drawing, as text.
function shown(height, chart) {
  const [scale, offset] = chart.dataset.y.split(" ").map(Number);
  let value = (height - offset) / scale;
  if (chart.dataset.log === "1") value = 10 ** value;
  const share = chart.dataset.share === "1";
  return Number((share ? 100 * value : value).toPrecision(4)).toLocaleString("en", {
    maximumSignificantDigits: 4,
  }) + (share ? " %" : "");
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function visibleLines(chart) {
  return [...chart.querySelectorAll("g[data-run]")]
    .filter(group => getComputedStyle(group).display !== "none")
    .map(group => group.querySelector("[data-line]"))
    .filter(path => pointsOf(path).length);
}

// Move the cursor to the logged step next to `step` and say every run's value there.
function readAt(chart, step) {
  const lines = visibleLines(chart);
  if (!lines.length) return;
  const at = nearest(lines.map(path => nearest(pointsOf(path), step)), step)[0];
  const [scale, offset] = chart.dataset.x.split(" ").map(Number);
  const cursor = chart.querySelector(".cursor");
  cursor.setAttribute("transform", `translate(${at * scale + offset} 0)`);
  cursor.style.visibility = "visible";
  chart.step = at;
  const readout = chart.nextElementSibling;
  const head = document.createElement("span");
  head.textContent = `${chart.dataset.axis} ${at.toLocaleString("en")}:`;
  readout.replaceChildren(head);
  for (const path of lines) {
    const { run, note } = path.parentElement.dataset;
    const entry = document.createElement("span");
    entry.className = `r${run}`;
    const label = document.getElementById(`run${run}`).parentElement.textContent + (note ? `, ${note}` : "");
    const point = nearest(pointsOf(path), at);
    const other = point[0] === at ? "" : ` (${chart.dataset.axis} ${point[0].toLocaleString("en")})`;
    entry.append(document.createElement("i"), `${label} ${shown(point[1], chart)}${other}`);
    readout.append(" ", entry);
  }
}

for (const chart of document.querySelectorAll(".chart svg")) {
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const place = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    const [scale, offset] = chart.dataset.x.split(" ").map(Number);
    readAt(chart, (place - offset) / scale);
  });
  chart.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    const lines = visibleLines(chart);
    if (move === undefined || !lines.length) return;
    event.preventDefault();
    const steps = [...new Set(lines.flatMap(path => pointsOf(path).map(point => point[0])))].sort((a, b) => a - b);
    const last = steps.length - 1;
    const now = chart.step === undefined ? last : steps.indexOf(nearest(steps.map(step => [step]), chart.step)[0]);
    readAt(chart, steps[Math.min(last, Math.max(0, now + move))]);
  });
}

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
