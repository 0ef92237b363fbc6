// What happens in each layer: tokens worked on, and the load of experts.

// One order of all layers: each arm's own order is kept.
function layerOrder(shown) {
  const order = [];
  for (const arm of shown) {
    let place = 0;
    for (const { layer } of arm.tokens_by_layer) {
      const at = order.indexOf(layer);
      if (at < 0) order.splice(place++, 0, layer);
      else place = at + 1;
    }
  }
  return order;
}

function tokens(div) {
  const shown = arms.filter((arm) => arm.tokens_by_layer && arm.tokens_by_layer.length);
  const order = layerOrder(shown);
  const blocks = order.every((layer) => /^block_\d+$/.test(layer));
  const same = (a, b) => JSON.stringify(a.tokens_by_layer) === JSON.stringify(b.tokens_by_layer);
  const traces = shown.map((arm, index) => ({
    x: arm.tokens_by_layer.map((each) => order.indexOf(each.layer)),
    y: arm.tokens_by_layer.map((each) => each.tokens),
    mode: "lines+markers",
    opacity: opacity(arm),
    meta: arm.name,
    line: {
      shape: "hvh",
      color: color(arm),
      dash: view.looks[arm.name].dash,
      width: 2 + 3 * shown.slice(index + 1).filter((other) => same(arm, other)).length,
    },
    // Each arm marks other layers, so that lines upon each other show all their markers.
    marker: {
      color: color(arm),
      symbol: symbol(arm),
      size: arm.tokens_by_layer.map((_, k) => ((k + index) % 3 ? 0 : 9)),
      opacity: 1,
      line: { width: arm.status === "finished" ? 0 : 1.5 },
    },
    customdata: arm.tokens_by_layer.map((each) => [
      plain(arm.name),
      plain(each.layer),
      each.tokens.toLocaleString("en"),
    ]),
    hovertemplate: "<b>%{customdata[0]}</b><br>%{customdata[1]}: %{customdata[2]} tokens<extra></extra>",
  }));
  const every = Math.max(1, Math.ceil(order.length / (div.clientWidth / (blocks ? 34 : 90))));
  const ticks = order.map((_, index) => index).filter((index) => index % every === 0);
  Plotly.react(
    div,
    traces,
    layout(
      { l: 52, r: 16, t: 10, b: 50 },
      {
        xaxis: {
          title: blocks ? "block" : "layer",
          range: [-0.6, order.length - 0.4],
          tickvals: ticks,
          ticktext: ticks.map((index) =>
            blocks ? String(Number(order[index].slice(6))) : short(order[index], 12),
          ),
          tickangle: 0,
        },
        yaxis: { rangemode: "tozero", nticks: 6, tickformat: ",~r" },
      },
    ),
    config,
  );
}

function experts(div) {
  const load = arms[Number(div.dataset.arm)].expert_load;
  const layers = Object.keys(load);
  const count = Math.max(...layers.map((layer) => load[layer].length));
  const most = Math.max(...layers.flatMap((layer) => load[layer]));
  const written = (value) => (most > 2 ? String(Number(value.toPrecision(3))) : value.toFixed(2));
  const room = count <= 8 && div.clientWidth > 380;
  const texts = layers.map((layer) => load[layer].map((value) => (room ? written(value) : "")));
  div.style.height = `${Math.min(620, 92 + 34 * layers.length)}px`;
  const trace = {
    type: "heatmap",
    z: layers.map((layer) => load[layer]),
    y: layers.map((layer) => plain(layer)),
    x: [...Array(count).keys()],
    colorscale: "Cividis",
    zmin: 0,
    zmax: most,
    xgap: 2,
    ygap: 2,
    text: texts,
    texttemplate: "%{text}",
    textfont: { size: 11.5 },
    colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 12, color: css("--soft") }, nticks: 5 },
    hovertemplate: "%{y}, expert %{x}: %{z}<extra></extra>",
  };
  Plotly.react(
    div,
    [trace],
    layout(
      { l: 70, r: 8, t: 8, b: 44 },
      {
        xaxis: { title: "expert", dtick: count > 16 ? undefined : 1, ticks: "" },
        yaxis: { autorange: "reversed", type: "category", showgrid: false, ticks: "", showline: false },
      },
    ),
    config,
  );
}
