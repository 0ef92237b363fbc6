"use strict";
// What the charts share: the results that the page carries, how arms look, numbers, and a layout.

const results = JSON.parse(document.getElementById("results").textContent);
const view = JSON.parse(document.getElementById("view").textContent);
const arms = results.arms;
const metric = results.metric.name;
const state = { focus: null, x: view.against, y: metric, split: view.splits[0], range: "all" };
const DIM = 0.13;

const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const color = (arm) => view.looks[arm.name].color || css("--ink");
const symbol = (arm) => view.looks[arm.name].symbol + (arm.status === "finished" ? "" : "-open");
const faded = (arm) => state.focus !== null && arms[state.focus] !== arm;
const opacity = (arm, full = 1) => (faded(arm) ? DIM * full : full);
// Plotly reads a little HTML in texts; these are plain.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const LONGEST = 22; // letters of a name in a chart; the whole of it is in the hover
const short = (text, most = LONGEST) => plain(text.length > most ? `${text.slice(0, most - 1)}…` : text);

const PREFIXES = { P: 1e15, T: 1e12, G: 1e9, M: 1e6, k: 1e3 };
function amount(value, unit) {
  if (unit === "s") {
    if (value < 1) return `${Number((value * 1000).toPrecision(3))} ms`;
    return `${value < 1000 ? Number(value.toPrecision(3)) : Math.round(value).toLocaleString("en")} s`;
  }
  for (const [prefix, factor] of Object.entries(PREFIXES)) {
    if (Math.abs(value) >= factor) return `${Number((value / factor).toPrecision(3))} ${prefix}${unit}`;
  }
  return `${Number(value.toPrecision(3))} ${unit}`.trim();
}
const quality = (value) => (Math.abs(value) < 10 ? value.toFixed(4) : String(Number(value.toPrecision(4))));

function layout(margin, extra) {
  const soft = css("--soft");
  const axis = {
    gridcolor: css("--faint"),
    linecolor: css("--faint"),
    zeroline: false,
    tickfont: { size: 12, color: soft },
    automargin: false,
    fixedrange: matchMedia("(pointer: coarse)").matches,
  };
  const titled = (given) =>
    given.title
      ? { ...given, title: { text: given.title, standoff: 8, font: { size: 13, color: soft } } }
      : given;
  return {
    margin,
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hovermode: "closest",
    font: { family: css("--sans"), size: 13, color: css("--ink") },
    hoverlabel: {
      bgcolor: css("--panel"),
      bordercolor: css("--soft"),
      font: { family: css("--sans"), size: 13, color: css("--ink") },
      align: "left",
    },
    ...extra,
    xaxis: { ...axis, showgrid: false, ticks: "outside", tickcolor: css("--faint"), ...titled(extra.xaxis) },
    yaxis: { ...axis, ...extra.yaxis },
  };
}
const config = { displayModeBar: false, responsive: false, doubleClick: "reset" };
