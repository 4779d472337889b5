// Builds the page.

for (const swatch of document.querySelectorAll("[data-swatch]")) {
  swatch.style.background = `var(--run-${swatch.dataset.swatch % 8})`;
}
document.getElementById("class-names").append(
  ...images.classes.map((name) => element("option", { value: name })),
);
for (const select of document.querySelectorAll("select[data-run]")) {
  select.append(...runs.map((run, i) => element("option", { value: i }, run.name)));
  select.addEventListener("change", () => chooseRun(Number(select.value)));
}
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const pre = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = "Copied";
    } catch {
      // Some browsers deny local pages the clipboard; select the text instead.
      getSelection().selectAllChildren(pre);
    }
  });
}
drawTestMap();
document.getElementById("map-panel").append(
  element("p", { className: "quiet" }, "Point at an image or use the arrow keys."),
);
drawGallery();
drawClasses();
drawTraining();
drawCurves();
drawCurveTable();
drawHistograms();
drawConfidences();
dark.addEventListener("change", () => charts.forEach((draw) => draw()));
document.documentElement.dataset.ready = "true";
