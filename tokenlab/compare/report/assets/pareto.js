// Quality against a cost: a point an arm, the front, and names where there is room for them.

function padded(values, before, after) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const wide = high - low || Math.abs(high) * 0.1 || 1;
  return [low - wide * before, high + wide * after];
}

function costRange(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (high - low < 0.02 * high) return [low - 0.06 * high, high + 0.06 * high];
  return low < 0.6 * high ? [0, high * 1.22] : padded(values, 0.2, 0.35);
}

// Names beside their points, where they cover neither a point nor another name; what finds no place is left to
// the legend and the hover.
function labels(points, lines, size) {
  const around = (p, by) => ({ left: p.px - by, right: p.px + by, top: p.py - by, bottom: p.py + by });
  const taken = [...points.map((p) => around(p, 8)), ...lines];
  const found = [];
  for (const p of points) {
    const wide = Math.min(p.text.length, LONGEST) * 6.9 + 4;
    const [near, far] = [p.px + 11, p.px - 11 - wide];
    const places = [
      { xanchor: "left", yanchor: "middle", xshift: 11, yshift: 0, left: near, top: p.py - 8 },
      { xanchor: "right", yanchor: "middle", xshift: -11, yshift: 0, left: far, top: p.py - 8 },
      { xanchor: "right", yanchor: "bottom", xshift: -5, yshift: 4, left: p.px - 5 - wide, top: p.py - 21 },
      { xanchor: "left", yanchor: "top", xshift: 5, yshift: -4, left: p.px + 5, top: p.py + 5 },
      { xanchor: "left", yanchor: "bottom", xshift: 5, yshift: 4, left: p.px + 5, top: p.py - 21 },
      { xanchor: "right", yanchor: "top", xshift: -5, yshift: -4, left: p.px - 5 - wide, top: p.py + 5 },
      { xanchor: "center", yanchor: "bottom", xshift: 0, yshift: 10, left: p.px - wide / 2, top: p.py - 26 },
      { xanchor: "center", yanchor: "top", xshift: 0, yshift: -10, left: p.px - wide / 2, top: p.py + 10 },
    ];
    for (const place of places) {
      const rect = { left: place.left, right: place.left + wide, top: place.top, bottom: place.top + 16 };
      const outside =
        rect.left < 0 || rect.right > size.width + 10 || rect.top < -4 || rect.bottom > size.height;
      const own = taken[points.indexOf(p)];
      const clash = (t) =>
        t !== own && rect.left < t.right && rect.right > t.left && rect.top < t.bottom && rect.bottom > t.top;
      if (outside || taken.some(clash)) continue;
      taken.push(rect);
      found.push({
        x: p.x,
        y: p.y,
        text: short(p.text),
        showarrow: false,
        opacity: opacity(p.arm),
        font: { size: 12.5, color: css("--ink") },
        xanchor: place.xanchor,
        yanchor: place.yanchor,
        xshift: place.xshift,
        yshift: place.yshift,
      });
      break;
    }
  }
  return found;
}

function pareto(div) {
  const cost = view.costs.find((each) => each.key === div.dataset.cost);
  const shown = arms.filter((arm) => arm.quality !== null && arm[cost.key] !== null);
  const margin = { l: 52, r: 14, t: 10, b: 34 };
  const size = {
    width: div.clientWidth - margin.l - margin.r,
    height: div.clientHeight - margin.t - margin.b,
  };
  const xrange = costRange(shown.map((arm) => arm[cost.key]));
  const ends = shown
    .flatMap((arm) => [arm.quality.mean, arm.quality.low, arm.quality.high])
    .filter((y) => y !== null);
  const yrange = padded(ends, 0.08, 0.08);
  const best = view.fronts[cost.key].map((name) => arms.find((arm) => arm.name === name));
  const traces = [
    {
      x: [...best.map((arm) => arm[cost.key]), xrange[1]],
      y: [...best, best.at(-1)].map((arm) => arm.quality.mean),
      mode: "lines",
      hoverinfo: "skip",
      line: { shape: "hv", color: css("--soft"), width: 1.2 },
      opacity: 0.7,
    },
  ];
  for (const arm of shown) {
    const { mean, low, high } = arm.quality;
    const known = low !== null && high !== null;
    const range = known ? `${quality(low)} to ${quality(high)}` : "one seed";
    traces.push({
      x: [arm[cost.key]],
      y: [mean],
      mode: "markers",
      opacity: opacity(arm),
      meta: arm.name,
      marker: {
        size: 11,
        color: color(arm),
        symbol: symbol(arm),
        line: { width: arm.status === "finished" ? 0 : 2 },
      },
      error_y: known
        ? {
            type: "data",
            symmetric: false,
            array: [high - mean],
            arrayminus: [mean - low],
            color: color(arm),
            thickness: 1.2,
            width: 0,
          }
        : undefined,
      customdata: [
        [plain(arm.name), plain(metric), quality(mean), range, cost.title, amount(arm[cost.key], cost.unit)],
      ],
      hovertemplate:
        "<b>%{customdata[0]}</b><br>%{customdata[1]} %{customdata[2]} (%{customdata[3]})" +
        "<br>%{customdata[4]}: %{customdata[5]}<extra></extra>",
    });
  }
  const across = (x) => ((x - xrange[0]) / (xrange[1] - xrange[0])) * size.width;
  const down = (y) => (1 - (y - yrange[0]) / (yrange[1] - yrange[0])) * size.height;
  const points = shown.map((arm) => ({
    arm,
    x: arm[cost.key],
    y: arm.quality.mean,
    text: arm.name,
    px: across(arm[cost.key]),
    py: down(arm.quality.mean),
  }));
  // What a name is not to cover: the front, and the intervals.
  const lines = shown
    .filter((arm) => arm.quality.low !== null)
    .map((arm) => {
      const [px, top, bottom] = [across(arm[cost.key]), down(arm.quality.high), down(arm.quality.low)];
      return { left: px - 1, right: px + 1, top, bottom };
    });
  best.forEach((arm, index) => {
    const next = best[index + 1];
    const [left, py] = [across(arm[cost.key]), down(arm.quality.mean)];
    const right = next ? across(next[cost.key]) : size.width;
    lines.push({ left, right, top: py - 1, bottom: py + 1 });
    if (next) {
      const [a, b] = [py, down(next.quality.mean)];
      lines.push({ left: right - 1, right: right + 1, top: Math.min(a, b), bottom: Math.max(a, b) });
    }
  });
  // Those on the front choose their places first.
  points.sort((a, b) => best.includes(b.arm) - best.includes(a.arm));
  const suffix = cost.unit === "FLOPs" ? "" : cost.unit;
  Plotly.react(
    div,
    traces,
    layout(margin, {
      annotations: labels(points, lines, size),
      xaxis: { range: xrange, tickformat: "~s", ticksuffix: suffix, nticks: div.clientWidth < 420 ? 5 : 7 },
      yaxis: { range: yrange, nticks: 6, tickformat: "~g" },
    }),
    config,
  );
}
