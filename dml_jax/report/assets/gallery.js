// Queries with their neighbours, all runs side by side.

const PAGE = 8;

function drawGallery() {
  const order = document.getElementById("gallery-order");
  const search = document.getElementById("gallery-class");
  const list = document.getElementById("gallery-list");
  const more = document.getElementById("gallery-more");
  let sorted = [];

  // By average precision; ties by the rank of the first wrong neighbour.
  const orders = {
    worst: (run) => (a, b) => run.precision[a] - run.precision[b] || firstWrong(run, a) - firstWrong(run, b),
    best: (run) => (a, b) => run.precision[b] - run.precision[a],
    differ: () => (a, b) => spread(b) - spread(a),
  };
  const firstWrong = (run, query) => neighboursOf(run, query).findIndex((one) => !one.correct);
  const spread = (query) => {
    const precisions = runs.map((run) => run.precision[query]);
    return Math.max(...precisions) - Math.min(...precisions);
  };

  function sort() {
    const label = images.classes.indexOf(search.value);
    sorted = [...queries.keys()].filter((query) => runs[0].answerable[query]
      && (label < 0 || images.labels[queries[query]] === label));
    if (order.value === "random") shuffle(sorted);
    else sorted.sort(orders[order.value](runs[state.run]));
    list.replaceChildren();
    extend();
  }

  function extend() {
    const start = list.children.length;
    list.append(...sorted.slice(start, start + PAGE).map(result));
    document.getElementById("gallery-count").textContent = `${list.children.length.toLocaleString("en")} of ${sorted.length.toLocaleString("en")} queries`;
    more.hidden = list.children.length === sorted.length;
  }

  order.addEventListener("change", sort);
  search.addEventListener("input", () => {
    if (!search.value || images.classes.includes(search.value)) sort();
  });
  more.addEventListener("click", extend);
  state.listeners.push(sort);
  showClass = (label) => {
    search.value = images.classes[label];
    sort();
    document.getElementById("gallery").scrollIntoView();
    search.focus({ preventScroll: true });
  };
  sort();
}

// Filters the gallery by class; set by drawGallery, called by the table of classes.
let showClass;

function shuffle(items) {
  for (let i = items.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [items[i], items[j]] = [items[j], items[i]];
  }
}

function result(query) {
  const image = queries[query];
  const caption = element("p", { className: "caption quiet" });
  const queryImage = thumbnail("button", image, `query: ${className(image)}, ${images.names[image]}`);
  queryImage.addEventListener("click", () => testMap.show(image));
  const found = element("div", { className: "found" });
  runs.forEach((run) => {
    const precision = element("span", { className: "quiet" }, `AP ${percent(run.precision[query], 0)} %`);
    found.append(
      element("p", {}, runs.length > 1 ? run.name : "", precision),
      element("div", { className: "strip" }, ...neighboursOf(run, query).map(neighbourThumbnail)),
    );
  });
  const made = element(
    "article", { className: "result", dataset: { query, precision: runs[state.run].precision[query] } },
    element("div", { className: "query" }, queryImage, element("p", {}, className(image))), found, caption,
  );
  // The caption names the image under the pointer or with the focus.
  const name = (event) => {
    const thumb = event.target.closest(".thumb");
    if (thumb) caption.textContent = thumb.getAttribute("aria-label");
  };
  made.addEventListener("mouseover", name);
  made.addEventListener("focusin", name);
  return made;
}
