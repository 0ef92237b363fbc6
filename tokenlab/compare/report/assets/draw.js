// Drawing all of it, and the buttons.

const kinds = { pareto, curves, tokens, experts };
const divs = [...document.querySelectorAll("[data-chart]")];
function draw(only) {
  for (const div of divs) if (!only || div.dataset.chart === only) kinds[div.dataset.chart](div);
  root.dataset.charts = String(divs.filter((div) => div.querySelector(".main-svg")).length);
}

document.querySelectorAll("[data-set]").forEach((button) => {
  button.addEventListener("click", () => {
    state[button.dataset.set] = button.dataset.to;
    button.parentElement
      .querySelectorAll("button")
      .forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    draw("curves");
  });
});
document.querySelectorAll(".chip").forEach((chip) => {
  chip.addEventListener("click", () => {
    const index = Number(chip.dataset.arm);
    state.focus = state.focus === index ? null : index;
    document
      .querySelectorAll(".chip")
      .forEach((each) => each.setAttribute("aria-pressed", String(Number(each.dataset.arm) === state.focus)));
    draw();
  });
});
document.addEventListener("looks", () => draw());
draw();

// Drawn anew when the room changes: names find other places.
let width = root.clientWidth;
let waiting;
function again() {
  divs.forEach((div) => Plotly.purge(div));
  draw();
}
addEventListener("resize", () => {
  if (root.clientWidth === width) return;
  width = root.clientWidth;
  clearTimeout(waiting);
  waiting = setTimeout(again, 120);
});
