// The data of the page, and helpers shared by all sections.

const content = JSON.parse(document.getElementById("content").textContent);

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

const images = { ...content.images, labels: unpack(content.images.labels) };
const queries = unpack(content.queries);
// The index of each image among the queries, or -1.
const queryOf = new Int32Array(images.names.length).fill(-1);
queries.forEach((image, query) => { queryOf[image] = query; });
const runs = content.runs.map((run) => ({
  ...run,
  neighbours: unpack(run.neighbours),
  similarities: Float32Array.from(unpack(run.similarities), (x) => x / 10000 - 1),
  precision: Float32Array.from(unpack(run.precision), (x) => x / 10000),
  answerable: unpack(run.answerable),
  positions: Float32Array.from(unpack(run.positions), (x) => x / 65535),
}));

const state = { run: 0, listeners: [] };

function chooseRun(run) {
  state.run = run;
  for (const select of document.querySelectorAll("select[data-run]")) select.value = run;
  for (const listener of state.listeners) listener();
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset") Object.assign(made.dataset, value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
const runColour = (run) => colour(`--run-${run % 8}`);

// The golden angle gives successive classes distant hues.
function classColour(label) {
  return `hsl(${(label * 137.508) % 360} ${dark.matches ? "62% 64%" : "62% 44%"})`;
}

const sheetTexts = [...document.querySelectorAll("script.sheet")];
const sheetUrls = [];

function sheetUrl(sheet) {
  if (!sheetUrls[sheet]) {
    const bytes = Uint8Array.from(atob(sheetTexts[sheet].textContent), (x) => x.charCodeAt(0));
    sheetUrls[sheet] = URL.createObjectURL(new Blob([bytes], { type: "image/webp" }));
    sheetTexts[sheet].textContent = "";
  }
  return sheetUrls[sheet];
}

const thumbnailCount = images.names.length
  + content.training.reduce((sum, one) => sum + one.names.length, 0);

function thumbnailPosition(index) {
  const perSheet = images.columns ** 2;
  const sheet = Math.floor(index / perSheet), inSheet = index % perSheet;
  return {
    sheet,
    column: inSheet % images.columns,
    row: Math.floor(inSheet / images.columns),
    rows: Math.ceil(Math.min(perSheet, thumbnailCount - sheet * perSheet) / images.columns),
  };
}

// An element showing a thumbnail at any size: the sheet is scaled in percent of the element.
function thumbnail(tag, index, label, className = "") {
  const { sheet, column, row, rows } = thumbnailPosition(index);
  const made = element(tag, { className: `thumb ${className}`, title: label });
  if (tag === "button") made.type = "button";
  else made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  made.dataset.image = index;
  made.style.backgroundImage = `url(${sheetUrl(sheet)})`;
  made.style.backgroundSize = `${images.columns * 100}% ${rows * 100}%`;
  const vertical = rows > 1 ? (100 * row) / (rows - 1) : 0;
  made.style.backgroundPosition = `${(100 * column) / (images.columns - 1)}% ${vertical}%`;
  return made;
}

const sheetImages = [];

// The sheet as an image to draw on a canvas, or null until it is decoded.
function sheetImage(sheet, ready) {
  if (!sheetImages[sheet]) {
    sheetImages[sheet] = element("img", { src: sheetUrl(sheet) });
    sheetImages[sheet].decode().then(ready);
  }
  return sheetImages[sheet].complete ? sheetImages[sheet] : null;
}

const className = (image) => images.classes[images.labels[image]];
const percent = (fraction, digits = 1) => (100 * fraction).toFixed(digits);

// The neighbours that a run finds for a query, nearest first.
function neighboursOf(run, query) {
  const found = [];
  for (let i = query * run.perQuery; i < (query + 1) * run.perQuery; i++) {
    const image = run.neighbours[i];
    const correct = images.labels[image] === images.labels[queries[query]];
    found.push({ image, correct, similarity: run.similarities[i] });
  }
  return found;
}

function neighbourThumbnail({ image, correct, similarity }) {
  const label = `${correct ? "correct" : "wrong"}: ${className(image)}, ${images.names[image]}, cosine ${similarity.toFixed(2)}`;
  const made = thumbnail("button", image, label, correct ? "correct" : "wrong");
  made.addEventListener("click", () => testMap.show(image));
  return made;
}
