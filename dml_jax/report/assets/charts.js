// Learning curves and histograms, drawn by Plotly in the page's colours.

const charts = [];

function chartLayout(x, suffix) {
  const axis = (title) => ({
    title: { text: title, font: { size: 12 } }, gridcolor: colour("--line"), zeroline: false,
    linecolor: colour("--line"), automargin: true, fixedrange: true,
  });
  return {
    margin: { l: 8, r: 8, t: 12, b: 8 }, showlegend: false, dragmode: false, hovermode: "x unified",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--quiet") },
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    xaxis: axis(x), yaxis: { ...axis(""), ticksuffix: suffix, rangemode: "tozero" },
  };
}

// Calls traces() and layout() again when the colours change.
function addChart(parent, title, traces, layout) {
  const plot = element("div");
  parent.append(element("div", { className: "chart" }, element("h3", {}, title), plot));
  const draw = () => Plotly.react(plot, traces(), layout(), { displayModeBar: false });
  charts.push(draw);
  draw();
  // The place of a chart changes when further charts are added, not only with the window.
  new ResizeObserver(() => Plotly.Plots.resize(plot)).observe(plot);
}

const axis = () => Number(document.querySelector("input[name=axis]:checked").value);

// The unit of time for the longest run, and its seconds.
function timeUnit() {
  const longest = Math.max(0, ...content.curves.flatMap((c) => c.lines.loss.map((line) => line[1] ?? 0)));
  if (longest > 7200) return ["hours", 3600];
  return longest > 180 ? ["minutes", 60] : ["seconds", 1];
}

function curveTraces(metric, scale) {
  const [, unit] = timeUnit();
  return content.curves.map((curve) => {
    const line = curve.lines[metric].filter((point) => point[axis()] !== null);
    const alone = content.curves.filter((other) => other.group === curve.group).length === 1;
    return {
      x: line.map((point) => (axis() ? point[1] / unit : point[0])),
      y: line.map((point) => point[2] * scale),
      name: runs[curve.group].name + (alone ? "" : `, seed ${curve.seed}`),
      mode: line.length > 30 ? "lines" : "lines+markers",
      line: { color: runColour(curve.group), width: alone ? 2 : 1.25 },
      marker: { size: 5 },
      hovertemplate: scale === 100 ? "%{y:.1f} %" : "%{y:.3~f}",
    };
  });
}

function drawCurves() {
  const parent = document.getElementById("curve-charts");
  const last = Math.max(...content.curves.flatMap((c) => c.lines.loss.map((line) => line[0])));
  const layout = (unit) => () => {
    const made = chartLayout(axis() ? timeUnit()[0] : "epoch", unit);
    if (!axis() && last <= 10) made.xaxis.dtick = 1; // Integer epochs only.
    return made;
  };
  for (const [name, metric] of content.scores) {
    addChart(parent, name, () => curveTraces(metric, 100), layout("%"));
  }
  addChart(parent, "Loss", () => curveTraces("loss", 1), layout(""));
  if (content.curves.some((curve) => curve.lines.memvir_classes.length)) {
    addChart(parent, "Classes in the loss", () => curveTraces("memvir_classes", 1), layout(""));
  }
  for (const input of document.querySelectorAll("input[name=axis]")) {
    input.addEventListener("change", () => charts.forEach((draw) => draw()));
  }
}

// The curves as a table, for screen readers.
function drawCurveTable() {
  const titles = ["Run", "Seed", "Epoch", "Seconds", "Loss", ...content.scores.map(([name]) => name)];
  const head = element("tr", {}, ...titles.map((x, i) => element("th", { scope: "col", className: i ? "number" : "" }, x)));
  const rows = [];
  for (const curve of content.curves) {
    const scores = content.scores.map(([, metric]) => new Map(curve.lines[metric].map((x) => [x[0], x[2]])));
    for (const [epoch, seconds, loss] of curve.lines.loss) {
      const cells = [
        runs[curve.group].name, curve.seed, epoch, seconds ?? "–", loss.toFixed(3),
        ...scores.map((score) => (score.has(epoch) ? percent(score.get(epoch)) : "–")),
      ];
      rows.push(element("tr", {}, ...cells.map((x, i) => element("td", { className: i ? "number" : "" }, String(x)))));
    }
  }
  document.getElementById("curve-table").append(
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
  );
}

function drawHistograms() {
  const parent = document.getElementById("similarity-charts");
  const start = ({ same, other }) => same.findIndex((count, bin) => count + other[bin] > 0);
  // All runs share the axis.
  const first = Math.max(0, Math.min(...runs.map((run) => start(run.histogram))) - 1);
  runs.forEach((run) => {
    const { same, other } = run.histogram;
    const centres = same.map((_, bin) => -1 + (2 * (bin + 0.5)) / same.length);
    const trace = (counts, name, hue) => {
      const total = Math.max(1, counts.reduce((a, b) => a + b, 0));
      return {
        x: centres.slice(first), y: counts.slice(first).map((count) => (100 * count) / total), name,
        line: { color: colour(hue), width: 1.5, shape: "hvh" }, fill: "tozeroy", mode: "lines",
        fillcolor: `color-mix(in srgb, ${colour(hue)} 22%, transparent)`, hovertemplate: "%{y:.1f} %",
      };
    };
    const layout = () => {
      const made = chartLayout("cosine", "%");
      return {
        ...made, showlegend: true, xaxis: { ...made.xaxis, range: [centres[first], 1.02] },
        legend: { orientation: "h", x: 0, y: 1.16, bgcolor: "rgba(0,0,0,0)", itemclick: false, itemdoubleclick: false },
      };
    };
    const traces = () => [trace(other, "other class", "--quiet"), trace(same, "same class", "--accent")];
    addChart(parent, run.name, traces, layout);
  });
}

// The confidence in the first of two classes, from an embedding of it to one of the second.
function drawConfidences() {
  const parent = document.getElementById("confidence-charts");
  if (!parent) return;
  const shown = content.confidences.map((y, run) => ({ y, run })).filter(({ y }) => y);
  const traces = () => shown.map(({ y, run }) => ({
    x: content.positions, y: y.map((one) => 100 * one), name: runs[run].name, mode: "lines",
    line: { color: runColour(run), width: 2 }, hovertemplate: "%{y:.1f} %",
  }));
  const layout = () => {
    const made = chartLayout("position between the embeddings", "%");
    return { ...made, yaxis: { ...made.yaxis, range: [0, 102] } };
  };
  addChart(parent, "Confidence in the first class", traces, layout);
}
