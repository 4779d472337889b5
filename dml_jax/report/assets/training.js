// The map of training classes with synthetic and virtual classes.

const IMAGE = 0, PROXY = 1, SYNTHETIC_PROXY = 3, REMEMBERED_PROXY = 5, TEST_IMAGE = 6;

function paintSymbol(context, kind, x, y, hue) {
  const proxy = kind % 2 === 1, hollow = kind === 2 || kind === SYNTHETIC_PROXY;
  const radius = { [PROXY]: 9, [SYNTHETIC_PROXY]: 5.5, [REMEMBERED_PROXY]: 5 }[kind] ?? 4;
  context.beginPath();
  if (proxy) {
    context.moveTo(x, y - radius);
    context.lineTo(x + radius, y);
    context.lineTo(x, y + radius);
    context.lineTo(x - radius, y);
    context.closePath();
  } else if (kind === TEST_IMAGE) {
    context.moveTo(x, y - 5);
    context.lineTo(x + 5, y + 4);
    context.lineTo(x - 5, y + 4);
    context.closePath();
  } else if (kind === 4) context.rect(x - 3, y - 3, 6, 6);
  else context.arc(x, y, radius, 0, 7);
  context.fillStyle = context.strokeStyle = hue;
  context.lineWidth = 1.5;
  if (hollow) context.stroke();
  else context.fill();
  if (kind === PROXY) {
    context.strokeStyle = colour("--text");
    context.stroke();
  }
}

function drawTraining() {
  if (!content.training.length) return;
  const select = document.getElementById("training-run");
  const panel = document.getElementById("training-panel");
  const kinds = document.getElementById("training-kinds");
  content.training.forEach((one, i) => select.append(element("option", { value: i }, one.name)));
  document.getElementById("training-run-field").hidden = content.training.length < 2;
  let shown, positions, marked = -1;
  const hidden = new Set();
  const colouring = document.getElementById("training-colour");
  const tone = (angle) => `hsl(${angle} ${dark.matches ? "65% 64%" : "65% 45%"})`;
  // Eight evenly spaced hues, and between them those of further classes.
  const hue = (label) => tone(label * 45 + 10 + 22 * Math.floor(label / 8));

  function pointColour(i, oldest) {
    const own = hue(shown.label[i]);
    // From blue, the latest step, to red, the oldest one.
    if (colouring.value === "step") return shown.age[i] ? tone(240 * (1 - shown.age[i] / oldest)) : colour("--text");
    return shown.second[i] >= 0 ? `color-mix(in srgb, ${own}, ${hue(shown.second[i])})` : own;
  }

  const map = pointMap(document.getElementById("training-canvas"), {
    positions: () => positions ?? [],
    visible: (i) => !hidden.has(shown.kind[i]),
    paint,
    selected: showPoint,
    marked: (i) => {
      marked = i < 0 || shown.label[i] === marked ? -1 : shown.label[i];
      map.redraw();
    },
  });

  function paint(context, points) {
    const oldest = Math.max(1, ...shown.age);
    const inMarked = (i) => marked < 0 || shown.label[i] === marked || shown.second[i] === marked;
    const fade = (i) => (inMarked(i) ? 1 : 0.1) * (shown.age[i] && colouring.value === "class" ? 1 - (0.75 * shown.age[i]) / oldest : 0.9);
    if (!hidden.has(REMEMBERED_PROXY)) paintTrails(context, inMarked);
    for (const i of [...points].sort((a, b) => (shown.kind[a] === PROXY) - (shown.kind[b] === PROXY))) {
      context.globalAlpha = fade(i);
      paintSymbol(context, shown.kind[i], ...map.at(i), pointColour(i, oldest));
    }
    context.globalAlpha = 1;
    if (map.current < 0 || hidden.has(shown.kind[map.current])) return;
    const [x, y] = map.at(map.current);
    context.strokeStyle = colour("--text");
    context.lineWidth = 2;
    context.strokeRect(x - 11, y - 11, 22, 22);
  }

  // Lines from the proxy of a class through its remembered proxies, by age.
  function paintTrails(context, inMarked) {
    const perLabel = shown.classes.map(() => []);
    shown.kind.forEach((kind, i) => { if (kind === REMEMBERED_PROXY) perLabel[shown.label[i]].push(i); });
    perLabel.forEach((trail, label) => {
      const ages = new Set(trail.map((i) => shown.age[i]));
      // Classes with several proxies have no single trajectory.
      if (!trail.length || ages.size < trail.length) return;
      const start = shown.kind.findIndex((kind, i) => kind === PROXY && shown.label[i] === label);
      context.globalAlpha = inMarked(start) ? 0.5 : 0.08;
      context.strokeStyle = hue(label);
      context.lineWidth = 1.25;
      context.beginPath();
      context.moveTo(...map.at(start));
      trail.sort((a, b) => shown.age[a] - shown.age[b]).forEach((i) => context.lineTo(...map.at(i)));
      context.stroke();
    });
  }

  function showPoint(i) {
    const kind = shown.kind[i], classes = [shown.label[i], shown.second[i]].filter((x) => x >= 0);
    const isImage = kind === IMAGE || kind === TEST_IMAGE;
    const parts = isImage
      ? [thumbnail("span", shown.firstThumbnail + i, shown.names[i], "subject")] : [];
    parts.push(element("h3", {}, classes.map((x) => shown.classes[x]).join(" + ")));
    const age = shown.age[i] ? `, ${shown.age[i]} step${shown.age[i] > 1 ? "s" : ""} old` : "";
    parts.push(element("p", { className: "quiet" }, content.kinds[kind] + age));
    if (isImage) parts.push(element("p", { className: "quiet" }, shown.names[i]));
    panel.replaceChildren(...parts);
  }

  function choose() {
    const one = content.training[select.value];
    shown = one;
    positions = Float32Array.from(unpack(one.positions), (x) => x / 65535);
    marked = map.current = -1;
    const remembers = one.age.some((age) => age > 0);
    document.getElementById("training-colour-field").hidden = !remembers;
    if (!remembers) colouring.value = "class";
    hidden.clear();
    panel.replaceChildren(element("p", { className: "quiet" }, "Point at an item or use the arrow keys."));
    const present = [...new Set(one.kind)].sort();
    kinds.replaceChildren(...present.map((kind) => {
      const box = element("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => {
        hidden[box.checked ? "delete" : "add"](kind);
        map.redraw();
      });
      return element("label", {}, box, symbol(kind), content.kinds[kind]);
    }));
    map.redraw();
  }

  function symbol(kind) {
    const icon = element("canvas", { width: 36, height: 36 });
    icon.setAttribute("aria-hidden", "true");
    const context = icon.getContext("2d");
    context.scale(2, 2);
    context.globalAlpha = kind === 4 || kind === REMEMBERED_PROXY ? 0.55 : 1;
    paintSymbol(context, kind, 9, 9, colour("--quiet"));
    return icon;
  }
  select.addEventListener("change", choose);
  colouring.addEventListener("change", () => map.redraw());
  dark.addEventListener("change", choose);
  choose();
}
