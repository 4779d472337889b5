// The sortable table of classes, and the pairs of classes that are confused.

const FIRST_ROWS = 12;

// The first image of each class.
function examplesByClass() {
  const first = new Map();
  images.labels.forEach((label, image) => { if (!first.has(label)) first.set(label, image); });
  return first;
}

function drawClasses() {
  const table = document.getElementById("class-table");
  const more = document.getElementById("class-more");
  const examples = examplesByClass();
  const labels = images.classes.map((_, label) => label).filter((label) => runs[0].classes.queries[label] > 0);
  const columns = [
    { title: "Class", value: (label) => images.classes[label], text: true },
    { title: "Images", value: (label) => runs[0].classes.queries[label] },
  ];
  for (const [i, run] of runs.entries()) {
    const prefix = runs.length > 1 ? `${run.name} ` : "";
    columns.push(
      { title: `${prefix}R@1`, value: (label) => run.classes.recall[label], run: i, percent: true },
      { title: `${prefix}MAP@R`, value: (label) => run.classes.precision[label], run: i, percent: true },
    );
  }
  let sortedBy = columns[3], descending = false, all = false;

  function compare(a, b) {
    const [x, y] = [sortedBy.value(a), sortedBy.value(b)];
    const sign = sortedBy.text ? x.localeCompare(y) : x - y;
    return descending ? -sign : sign;
  }

  function draw() {
    const sorted = [...labels].sort(compare);
    const head = element("tr", {}, element("th", {}, element("span", { className: "hidden" }, "Example")));
    for (const column of columns) {
      const mark = column === sortedBy ? (descending ? " ↓" : " ↑") : "";
      const button = element("button", { type: "button" }, column.title + mark);
      button.addEventListener("click", () => {
        descending = column === sortedBy ? !descending : false;
        sortedBy = column;
        draw();
        table.querySelector("th[aria-sort] button").focus();
      });
      const cell = element("th", { scope: "col", className: column.text ? "" : "number" }, button);
      if (column === sortedBy) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      head.append(cell);
    }
    const rows = sorted.slice(0, all ? undefined : FIRST_ROWS).map((label) => row(label));
    table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
    more.hidden = labels.length <= FIRST_ROWS;
    more.textContent = all ? "Show fewer" : `Show all ${labels.length.toLocaleString("en")}`;
  }

  function row(label) {
    const name = element("button", { type: "button", className: "name", title: "Show the queries of this class" }, images.classes[label]);
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
      const thumbnails = [pair.first, pair.second].map((label) => (
        examples.has(label) ? thumbnail("span", examples.get(label), images.classes[label]) : element("span")
      ));
      const summary = `${pair.first_as_second + pair.second_as_first} of ${pair.queries}`;
      const text = element("span", {}, `${images.classes[pair.first]} ↔ ${images.classes[pair.second]} `);
      text.append(element("span", { className: "quiet" }, `${summary} (${pair.first_as_second} + ${pair.second_as_first})`));
      return element("li", {}, ...thumbnails, text);
    }));
    if (!confused.length) pairs.append(element("li", {}, "None: every first neighbour is correct."));
  }
  state.listeners.push(drawPairs);
  drawPairs();
}
