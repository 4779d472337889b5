// The table of classes, sortable by every column, and the pairs that are taken for each other.

const FIRST_ROWS = 12;

function exampleOf() {
  const first = new Map();
  images.labels.forEach((label, image) => { if (!first.has(label)) first.set(label, image); });
  return first;
}

function drawClasses() {
  const table = document.getElementById("class-table");
  const more = document.getElementById("class-more");
  const examples = exampleOf();
  const labels = images.classes.map((_, label) => label).filter((label) => runs[0].classes.queries[label] > 0);
  const columns = [
    { title: "Class", value: (label) => images.classes[label], text: true },
    { title: "Images", value: (label) => runs[0].classes.queries[label] },
  ];
  for (const [i, run] of runs.entries()) {
    const of = runs.length > 1 ? `${run.name} ` : "";
    columns.push(
      { title: `${of}R@1`, value: (label) => run.classes.recall[label], run: i, percent: true },
      { title: `${of}MAP@R`, value: (label) => run.classes.precision[label], run: i, percent: true },
    );
  }
  let by = columns[3], down = false, all = false;

  function compare(a, b) {
    const [x, y] = [by.value(a), by.value(b)];
    const sign = by.text ? x.localeCompare(y) : x - y;
    return down ? -sign : sign;
  }

  function draw() {
    const sorted = [...labels].sort(compare);
    const head = element("tr", {}, element("th", {}, element("span", { className: "hidden" }, "Example")));
    for (const column of columns) {
      const mark = column === by ? (down ? " ↓" : " ↑") : "";
      const button = element("button", { type: "button" }, column.title + mark);
      button.addEventListener("click", () => {
        down = column === by ? !down : false;
        by = column;
        draw();
        table.querySelector("th[aria-sort] button").focus();
      });
      const cell = element("th", { scope: "col", className: column.text ? "" : "number" }, button);
      if (column === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      head.append(cell);
    }
    const rows = sorted.slice(0, all ? undefined : FIRST_ROWS).map((label) => row(label));
    table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
    more.hidden = labels.length <= FIRST_ROWS;
    more.textContent = all ? "Show fewer" : `Show all ${labels.length.toLocaleString("en")}`;
  }

  function row(label) {
    const name = element("button", { type: "button", className: "name", title: "Show its queries" }, images.classes[label]);
    name.addEventListener("click", () => showClass(label));
    const cells = columns.slice(1).map((column) => {
      const value = column.value(label);
      return element("td", { className: "number" }, column.percent ? percent(value) : String(value));
    });
    const example = examples.has(label) ? thumbnail("span", examples.get(label), images.classes[label]) : "";
    return element("tr", {}, element("td", {}, example), element("th", { scope: "row" }, name), ...cells);
  }
  more.addEventListener("click", () => { all = !all; draw(); });
  draw();

  const pairs = document.getElementById("confused");
  function drawPairs() {
    const confused = runs[state.run].confused.slice(0, FIRST_ROWS);
    pairs.replaceChildren(...confused.map((pair) => {
      const pictures = [pair.first, pair.second].map((label) => (
        examples.has(label) ? thumbnail("span", examples.get(label), images.classes[label]) : element("span")
      ));
      const told = `${pair.there + pair.back} of ${pair.queries}`;
      const text = element("span", {}, `${images.classes[pair.first]} ↔ ${images.classes[pair.second]} `);
      text.append(element("span", { className: "quiet" }, `${told} (${pair.there} + ${pair.back})`));
      return element("li", {}, ...pictures, text);
    }));
    if (!confused.length) pairs.append(element("li", {}, "None: every first neighbour is right."));
  }
  state.listeners.push(drawPairs);
  drawPairs();
}
