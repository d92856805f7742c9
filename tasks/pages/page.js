"use strict";
// Moves through the stops: pictures, cursors and numbers follow the slider.
const { stops, films } = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("stop");
const play = document.getElementById("play");
const stopName = document.getElementById("stop-name");
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const PICTURE = 28, PITCH = 30, COLUMNS = 5;

const pictures = films.map((film) => film.sheets.map((sheet) => {
  const picture = new Image();
  picture.addEventListener("load", show);
  picture.src = sheet;
  return picture;
}));

function show() {
  const stop = slider.valueAsNumber;
  const digit = document.querySelector("input[name=digit]:checked")?.value ?? "all";
  stopName.value = stops[stop];
  slider.setAttribute("aria-valuetext", stops[stop]);
  for (const canvas of document.querySelectorAll("canvas")) {
    const film = films[canvas.dataset.film];
    const asked = film.conditional ? digit : "all";
    draw(canvas, pictures[canvas.dataset.film][stop], asked);
    const what = asked === "all" ? "a hundred drawn digits" : `ten drawings of the digit ${asked}`;
    canvas.setAttribute("aria-label", `${film.name}: ${what} after epoch ${film.epochs[stop]}`);
  }
  for (const cursor of document.querySelectorAll(".cursor")) {
    const place = cursor.dataset.places.trim().split(" ")[stop];
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
  }
  for (const output of document.querySelectorAll("output[data-curve]")) {
    output.value = films[output.dataset.film].values[output.dataset.curve][stop];
  }
  for (const output of document.querySelectorAll("output[data-epoch]")) {
    output.value = `epoch ${films[output.dataset.epoch].epochs[stop]}`;
  }
}

// The whole sheet, or the row of one digit in two lines of five.
function draw(canvas, picture, digit) {
  if (!picture.complete) return;
  const pen = canvas.getContext("2d");
  if (digit === "all") {
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    pen.drawImage(picture, 0, 0);
    return;
  }
  [canvas.width, canvas.height] = [COLUMNS * PITCH + 2, 2 * PITCH + 2];
  pen.fillRect(0, 0, canvas.width, canvas.height);
  for (let place = 0; place < 2 * COLUMNS; place++) {
    pen.drawImage(
      picture, place * PITCH + 2, digit * PITCH + 2, PICTURE, PICTURE,
      (place % COLUMNS) * PITCH + 2, Math.floor(place / COLUMNS) * PITCH + 2, PICTURE, PICTURE,
    );
  }
}

let timer = null;

function pause() {
  clearInterval(timer);
  timer = null;
  play.textContent = "Play";
}

play.addEventListener("click", () => {
  if (timer !== null) return pause();
  if (slider.valueAsNumber === stops.length - 1) slider.value = 0;
  show();
  play.textContent = "Pause";
  timer = setInterval(() => {
    slider.valueAsNumber += 1;
    show();
    if (slider.valueAsNumber === stops.length - 1) pause();
  }, calm.matches ? 1500 : 500);
});

slider.addEventListener("input", () => { pause(); show(); });
for (const choice of document.querySelectorAll("input[name=digit]")) {
  choice.addEventListener("change", show);
}

// Pointing at a chart goes to the stop that is nearest there.
for (const chart of document.querySelectorAll(".chart svg")) {
  const cursors = [...chart.querySelectorAll(".cursor")];
  const places = cursors.map((cursor) => cursor.dataset.places.trim().split(" ").map(Number));
  const seek = (event) => {
    if (event.buttons !== 1 || slider.disabled) return;
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    const off = stops.map((_, stop) => Math.min(...places.map((at) => Math.abs(at[stop] - x))));
    pause();
    slider.value = off.indexOf(Math.min(...off));
    show();
  };
  chart.addEventListener("pointerdown", seek);
  chart.addEventListener("pointermove", seek);
}

show();
