// A map of points on a canvas, with selection by pointer and arrow keys, panning and zooming.
// It draws 12,000 points in a few milliseconds. Plotting libraries offer neither navigation by keys
// nor thumbnails as markers.

const MAX_ZOOM = 60;
const REACH = 16; // Maximum distance of the pointer from a selected point, in pixels.

// options: positions() returns [x0, y0, x1, ...] in 0..1; visible(i) returns whether a point is drawn;
// paint(context, points, map) draws; selected(i) is called when a point is selected, marked(i) on a
// click or Enter, with i = -1 on Escape or for no point.
function pointMap(canvas, options) {
  const map = { current: -1, zoom: 1, x: 0.5, y: 0.5, canvas };
  const context = canvas.getContext("2d");
  let frame = 0;

  map.size = () => Math.min(canvas.clientWidth, canvas.clientHeight) - 24;
  map.at = (i) => {
    const positions = options.positions(), scale = map.size() * map.zoom;
    return [
      (positions[2 * i] - map.x) * scale + canvas.clientWidth / 2,
      (positions[2 * i + 1] - map.y) * scale + canvas.clientHeight / 2,
    ];
  };
  const points = () => Array.from({ length: options.positions().length / 2 }, (_, i) => i).filter(options.visible);

  function draw() {
    frame = 0;
    const ratio = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    const inside = points().filter((i) => {
      const [x, y] = map.at(i);
      return x > -40 && y > -40 && x < canvas.clientWidth + 40 && y < canvas.clientHeight + 40;
    });
    options.paint(context, inside, map);
  }
  map.redraw = () => { frame ||= requestAnimationFrame(draw); };

  map.select = (i) => {
    if (i === map.current) return;
    map.current = i;
    options.selected(i);
    map.redraw();
  };

  map.zoomTo = (zoom, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) => {
    const old = map.size() * map.zoom;
    map.zoom = Math.min(MAX_ZOOM, Math.max(1, zoom));
    const now = map.size() * map.zoom;
    map.x += (x - canvas.clientWidth / 2) * (1 / old - 1 / now);
    map.y += (y - canvas.clientHeight / 2) * (1 / old - 1 / now);
    if (map.zoom === 1) map.x = map.y = 0.5;
    // Until the map is zoomed in, touch scrolls the page.
    canvas.style.touchAction = map.zoom > 1 ? "none" : "pan-y";
    map.redraw();
  };

  function nearest(x, y, reach = REACH) {
    let best = -1, least = reach ** 2;
    for (const i of points()) {
      const [px, py] = map.at(i), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  // The nearest point in a direction; lateral distance costs double.
  function step(dx, dy) {
    if (map.current < 0) return nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
    const [x, y] = map.at(map.current);
    let best = map.current, least = Infinity;
    for (const i of points()) {
      const [px, py] = map.at(i);
      const ahead = (px - x) * dx + (py - y) * dy, aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
      const cost = ahead + 2 * aside;
      if (i !== map.current && ahead > 0 && aside <= ahead && cost < least) [best, least] = [i, cost];
    }
    return best;
  }

  map.reveal = (i) => {
    const [x, y] = map.at(i);
    const margin = 24, { clientWidth, clientHeight } = canvas;
    if (x < margin || y < margin || x > clientWidth - margin || y > clientHeight - margin) {
      [map.x, map.y] = options.positions().slice(2 * i, 2 * i + 2);
    }
    map.redraw();
  };

  const keys = {
    ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (keys[event.key]) {
      const i = step(...keys[event.key]);
      if (i >= 0) { map.select(i); map.reveal(i); }
    } else if (event.key === "+" || event.key === "=") map.zoomTo(map.zoom * 1.5, ...focusPosition());
    else if (event.key === "-") map.zoomTo(map.zoom / 1.5, ...focusPosition());
    else if (event.key === "0") map.zoomTo(1);
    else if (event.key === "Enter" || event.key === " ") options.marked(map.current);
    else if (event.key === "Escape") options.marked(-1);
    else return;
    event.preventDefault();
  });
  const focusPosition = () => (map.current < 0 ? [] : map.at(map.current));
  canvas.addEventListener("focus", () => {
    if (map.current < 0 && canvas.matches(":focus-visible")) map.select(step(0, 0));
  });

  addPointers(map, canvas, nearest, options);
  new ResizeObserver(map.redraw).observe(canvas);
  dark.addEventListener("change", map.redraw);
  for (const button of canvas.closest("section").querySelectorAll("button[data-zoom]")) {
    const factor = { in: 1.6, out: 1 / 1.6, reset: 0 }[button.dataset.zoom];
    button.addEventListener("click", () => map.zoomTo(map.zoom * factor));
  }
  map.zoomTo(1);
  return map;
}

// Pointer events: hovering, dragging, pinching and the wheel.
function addPointers(map, canvas, nearest, options) {
  const down = new Map();
  let moved = 0;
  const position = (event) => [event.offsetX, event.offsetY];
  const spread = () => {
    const [[ax, ay], [bx, by]] = [...down.values()];
    return [Math.hypot(ax - bx, ay - by), (ax + bx) / 2, (ay + by) / 2];
  };
  canvas.addEventListener("pointerdown", (event) => {
    down.set(event.pointerId, position(event));
    moved = 0;
    if (event.pointerType === "mouse" || map.zoom > 1) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = position(event), before = down.get(event.pointerId);
    if (!before) {
      const i = nearest(...now);
      if (i >= 0) map.select(i);
      return;
    }
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (down.size === 2) {
      const [old] = spread();
      down.set(event.pointerId, now);
      const [distance, x, y] = spread();
      map.zoomTo((map.zoom * distance) / Math.max(old, 1), x, y);
    } else if (map.zoom > 1) {
      const scale = map.size() * map.zoom;
      map.x -= (now[0] - before[0]) / scale;
      map.y -= (now[1] - before[1]) / scale;
      map.redraw();
    }
    down.set(event.pointerId, now);
  });
  const up = (event) => {
    const clicked = event.type === "pointerup" && moved < 6 && down.size === 1;
    down.delete(event.pointerId);
    if (!clicked) return;
    const i = nearest(...position(event), event.pointerType === "mouse" ? REACH : 1.5 * REACH);
    if (i >= 0) map.select(i);
    options.marked(i);
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  // The wheel zooms only with Ctrl or if the map has the focus; otherwise it scrolls the page.
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    map.zoomTo(map.zoom * Math.exp(-event.deltaY / 300), ...position(event));
  }, { passive: false });
}

// The map of the test images.
const MAX_THUMBNAILS = 180; // With at most so many points in view, they are drawn as thumbnails.
const testMap = { marked: -1 };

function drawTestMap() {
  const canvas = document.getElementById("map-canvas");
  const search = document.getElementById("map-class");
  let positions = runs[0].positions;

  const map = pointMap(canvas, {
    positions: () => positions,
    visible: () => true,
    paint: paintTestMap,
    selected: (image) => showImage(document.getElementById("map-panel"), image),
    marked: (image) => mark(image < 0 ? -1 : images.labels[image]),
  });
  function mark(label) {
    testMap.marked = label === testMap.marked ? -1 : label;
    search.value = testMap.marked < 0 ? "" : images.classes[testMap.marked];
    map.redraw();
  }
  search.addEventListener("input", () => {
    testMap.marked = images.classes.indexOf(search.value);
    map.redraw();
  });
  testMap.show = (image) => {
    canvas.scrollIntoView({ block: "center" });
    canvas.focus({ preventScroll: true });
    map.select(image);
    map.reveal(image);
  };
  state.listeners.push(() => {
    const start = positions, end = runs[state.run].positions, began = performance.now();
    const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (map.current >= 0) showImage(document.getElementById("map-panel"), map.current);
    (function move(now) {
      const part = reducedMotion ? 1 : Math.min(1, Math.max(0, (now - began) / 450));
      const eased = part * part * (3 - 2 * part);
      positions = part === 1 ? end : start.map((x, i) => x + (end[i] - x) * eased);
      map.redraw();
      if (part < 1) requestAnimationFrame(move);
    })(began);
  });
}

function paintTestMap(context, points, map) {
  const faded = (i) => testMap.marked >= 0 && images.labels[i] !== testMap.marked;
  const close = points.length <= MAX_THUMBNAILS && map.zoom > 1.5;
  const side = Math.min(40, images.side), radius = Math.min(4, 1.8 + map.zoom / 4);
  // The marked class is drawn last, on top.
  for (const i of [...points.filter(faded), ...points.filter((i) => !faded(i))]) {
    const [x, y] = map.at(i);
    context.globalAlpha = faded(i) ? 0.12 : 0.85;
    context.fillStyle = context.strokeStyle = classColour(images.labels[i]);
    if (close) paintThumbnail(context, i, x, y, side, map.redraw);
    else {
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.fill();
    }
  }
  context.globalAlpha = 1;
  if (map.current >= 0) paintCurrent(context, map, side, close);
}

function paintThumbnail(context, index, x, y, side, ready) {
  const { sheet, column, row } = thumbnailPosition(index);
  const loaded = sheetImage(sheet, ready);
  if (!loaded) return;
  context.drawImage(
    loaded, column * images.side, row * images.side, images.side, images.side,
    x - side / 2, y - side / 2, side, side,
  );
  context.lineWidth = 2;
  context.strokeRect(x - side / 2, y - side / 2, side, side);
}

function paintCurrent(context, map, side, close) {
  const [x, y] = map.at(map.current), query = queryOf[map.current];
  context.lineWidth = 1.25;
  for (const { image, correct } of query < 0 ? [] : neighboursOf(runs[state.run], query)) {
    context.strokeStyle = colour(correct ? "--correct" : "--wrong");
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(...map.at(image));
    context.stroke();
  }
  paintThumbnail(context, map.current, x, y, close ? side : 28, map.redraw);
  context.strokeStyle = colour("--text");
  context.lineWidth = 2;
  const half = (close ? side : 28) / 2 + 2;
  context.strokeRect(x - half, y - half, 2 * half, 2 * half);
}

// Shows an image with its class and its neighbours in the panel beside the map.
function showImage(panel, image) {
  const run = runs[state.run], query = queryOf[image];
  const parts = [
    thumbnail("span", image, className(image), "subject"),
    element("h3", {}, className(image)),
    element("p", { className: "quiet" }, images.names[image]),
  ];
  if (query >= 0) {
    const found = neighboursOf(run, query);
    const correct = found.filter((one) => one.correct).length;
    const precision = run.answerable[query] ? `, AP ${percent(run.precision[query], 0)} %` : "";
    parts.push(
      element("p", { className: "quiet" }, `${correct} of its first ${found.length} neighbours are correct${precision}`),
      element("div", { className: "strip" }, ...found.map(neighbourThumbnail)),
    );
  }
  panel.replaceChildren(...parts);
}
