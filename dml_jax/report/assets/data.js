// What the page shows, unpacked, and the small things that all of it needs.

const content = JSON.parse(document.getElementById("content").textContent);

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

const images = { ...content.images, labels: unpack(content.images.labels) };
const queries = unpack(content.queries);
// Of each image, which query it is; -1 for those that are only found.
const queryOf = new Int32Array(images.names.length).fill(-1);
queries.forEach((image, query) => { queryOf[image] = query; });
const runs = content.runs.map((run) => ({
  ...run,
  neighbours: unpack(run.neighbours),
  similarities: Float32Array.from(unpack(run.similarities), (x) => x / 10000 - 1),
  precision: Float32Array.from(unpack(run.precision), (x) => x / 10000),
  answerable: unpack(run.answerable),
  places: Float32Array.from(unpack(run.places), (x) => x / 65535),
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

// Neighbouring class numbers get hues far apart.
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

const pictureCount = images.names.length
  + content.training.reduce((sum, one) => sum + one.names.length, 0);

function picturePlace(picture) {
  const perSheet = images.columns ** 2;
  const sheet = Math.floor(picture / perSheet), inSheet = picture % perSheet;
  return {
    sheet,
    column: inSheet % images.columns,
    row: Math.floor(inSheet / images.columns),
    rows: Math.ceil(Math.min(perSheet, pictureCount - sheet * perSheet) / images.columns),
  };
}

// A picture of any size: sheets are scaled in percent of the element.
function thumbnail(tag, picture, label, className = "") {
  const { sheet, column, row, rows } = picturePlace(picture);
  const made = element(tag, { className: `thumb ${className}`, title: label });
  if (tag === "button") made.type = "button";
  else made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  made.dataset.picture = picture;
  made.style.backgroundImage = `url(${sheetUrl(sheet)})`;
  made.style.backgroundSize = `${images.columns * 100}% ${rows * 100}%`;
  const down = rows > 1 ? (100 * row) / (rows - 1) : 0;
  made.style.backgroundPosition = `${(100 * column) / (images.columns - 1)}% ${down}%`;
  return made;
}

const sheetImages = [];

// For canvases: the sheet's image once it is decoded, and until then nothing.
function sheetImage(sheet, ready) {
  if (!sheetImages[sheet]) {
    sheetImages[sheet] = element("img", { src: sheetUrl(sheet) });
    sheetImages[sheet].decode().then(ready);
  }
  return sheetImages[sheet].complete ? sheetImages[sheet] : null;
}

const className = (image) => images.classes[images.labels[image]];
const percent = (fraction, digits = 1) => (100 * fraction).toFixed(digits);

// What a query finds, nearest first, by a run.
function neighboursOf(run, query) {
  const found = [];
  for (let i = query * run.perQuery; i < (query + 1) * run.perQuery; i++) {
    const image = run.neighbours[i];
    const right = images.labels[image] === images.labels[queries[query]];
    found.push({ image, right, similarity: run.similarities[i] });
  }
  return found;
}

function neighbourThumbnail({ image, right, similarity }) {
  const label = `${right ? "right" : "wrong"}: ${className(image)}, ${images.names[image]}, cosine ${similarity.toFixed(2)}`;
  const made = thumbnail("button", image, label, right ? "right" : "wrong");
  made.addEventListener("click", () => testMap.show(image));
  return made;
}
