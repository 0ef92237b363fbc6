// Learning curves: a line a seed, and one through the middle of them.

// The middle one of some values: one of them, never a mean of two.
const middle = (values) => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];

// Of the steps that all seeds have a record of.
function middleRun(runs) {
  const byStep = runs.map((run) => new Map(run.map((point) => [point.step, point])));
  const steps = [...byStep[0].keys()].filter((step) => byStep.every((points) => points.has(step)));
  return steps.map((step) => {
    const at = byStep.map((points) => points.get(step));
    return { x: middle(at.map((point) => point[state.x])), y: middle(at.map((point) => point[state.y])) };
  });
}

function curves(div) {
  const traces = [];
  const late = [];
  let end = 0;
  let begin = Infinity;
  arms.forEach((arm, index) => {
    const runs = arm.runs
      .map((run) =>
        run.curve.filter((p) => p.split === state.split && p[state.y] !== null && p[state.y] !== undefined),
      )
      .filter((run) => run.length);
    if (!runs.length) return;
    const width = state.focus === index ? 2.6 : 1.9;
    for (const run of runs) {
      end = Math.max(end, run.at(-1)[state.x]);
      begin = Math.min(begin, run[Math.floor(run.length / 2)][state.x]);
      late.push(...run.slice(Math.floor(run.length / 2)).map((point) => point[state.y]));
      if (runs.length > 1) {
        traces.push({
          x: run.map((p) => p[state.x]),
          y: run.map((p) => p[state.y]),
          mode: "lines",
          hoverinfo: "skip",
          opacity: opacity(arm, state.focus === index ? 0.6 : 0.28),
          line: { color: color(arm), width: 1, dash: view.looks[arm.name].dash },
        });
      }
    }
    const strong = middleRun(runs);
    const every = Math.max(1, Math.ceil(strong.length / 6));
    traces.push({
      x: strong.map((p) => p.x),
      y: strong.map((p) => p.y),
      mode: "lines+markers",
      opacity: opacity(arm),
      meta: arm.name,
      line: { color: color(arm), width, dash: view.looks[arm.name].dash },
      marker: {
        color: color(arm),
        symbol: symbol(arm),
        size: strong.map((_, k) => (k === strong.length - 1 ? 10 : (k + 1 + index) % every ? 0 : 7)),
        opacity: 1,
        line: { width: 0 },
      },
      customdata: strong.map((p) => [
        plain(arm.name),
        plain(state.y),
        quality(p.y),
        amount(p.x, state.x === "seconds" ? "s" : state.x === "step" ? "steps" : "FLOPs"),
      ]),
      hovertemplate:
        "<b>%{customdata[0]}</b><br>%{customdata[1]} %{customdata[2]}<br>%{customdata[3]}<extra></extra>",
    });
  });
  const empty = document.getElementById("curves-empty");
  empty.hidden = traces.length > 0;
  div.hidden = traces.length === 0;
  if (!traces.length) return;
  const narrow = div.clientWidth < 520;
  const titles = { step: "steps", train_flops: "counted training FLOPs", seconds: "seconds of training" };
  const close = state.range === "late";
  Plotly.react(
    div,
    traces,
    layout(
      { l: 52, r: 16, t: 10, b: 50 },
      {
        xaxis: {
          title: titles[state.x],
          range: [close ? begin : 0, end + (end - (close ? begin : 0)) * 0.02],
          tickformat: state.x === "train_flops" ? "~s" : ",~r",
          nticks: narrow ? 5 : 9,
        },
        yaxis: {
          range: close ? padded(late, 0.08, 0.12) : undefined,
          autorange: !close,
          nticks: 7,
          tickformat: "~g",
        },
      },
    ),
    config,
  );
}
