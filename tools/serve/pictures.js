// What the page draws: pitch classes of a melody, and the spectrogram of the music as it grows.
"use strict";

const NOTES = "C C# D D# E F F# G G# A A# B".split(" ");
const ROWS = 75, LOWEST = 60, HIGHEST = 6000;       // of the spectrogram: rows, Hz; even in mel
const LOUDEST = -15, FLOOR = -75;                   // dB that are brightest and black
const HEAT = [[0, 0, 4], [40, 17, 89], [114, 31, 129], [183, 55, 121], [241, 96, 93], [254, 176, 120],
  [252, 253, 191]];

function heat(share) {
  const place = Math.max(0, Math.min(0.999, share)) * (HEAT.length - 1), i = Math.floor(place);
  return HEAT[i].map((low, band) => low + (HEAT[i + 1][band] - low) * (place - i));
}

// Loudness of each row in dB: the samples around a place, compared with a wave of each row's pitch.
function loudness(rate) {
  const mel = hz => Math.log(1 + hz / 700), length = 2 ** Math.round(Math.log2(rate * 0.064)), rows = [];
  const window = Float32Array.from({ length }, (_, n) => 0.5 - 0.5 * Math.cos(2 * Math.PI * n / length));
  for (let row = 0; row < ROWS; row++) {
    const share = (ROWS - 1 - row) / (ROWS - 1);
    const hz = 700 * (Math.exp(mel(LOWEST) + share * (mel(HIGHEST) - mel(LOWEST))) - 1);
    const angle = n => 2 * Math.PI * hz * n / rate;
    rows.push([window.map((w, n) => w * Math.cos(angle(n))), window.map((w, n) => w * Math.sin(angle(n)))]);
  }
  return (samples, at) => rows.map(([cosines, sines]) => {
    let re = 0, im = 0;
    const start = at - length / 2, from = Math.max(0, -start), to = Math.min(length, samples.length - start);
    for (let n = from; n < to; n++) {
      re += samples[start + n] * cosines[n];
      im += samples[start + n] * sines[n];
    }
    return 10 * Math.log10(16 * (re * re + im * im) / (length * length) + 1e-10);
  });
}

function drawClasses(context, classes, frame, x, time, top, height) {     // one column of pitch classes
  const pitch = classes[Math.floor(time / frame) % classes.length];
  context.fillStyle = "#f1eee6";
  context.fillRect(x, top, 1, 12 * height);
  if (pitch < 0) return;
  context.fillStyle = "#c8503c";
  context.fillRect(x, top + (11 - pitch) * height, 1, height);
}

function describe(classes) {        // for those who do not see the picture
  const changes = classes.filter((pitch, i) => pitch >= 0 && pitch !== classes[i - 1]);
  const names = changes.map(pitch => NOTES[pitch]);
  return names.slice(0, 60).join(" ") + (names.length > 60 ? " …" : "");
}

function drawMelody(given) {
  const canvas = find("melody-picture"), width = canvas.width = Math.min(1000, 4 * given.classes.length);
  canvas.height = 12;
  const context = canvas.getContext("2d"), span = given.classes.length * given.frame;
  for (let x = 0; x < width; x++) drawClasses(context, given.classes, given.frame, x, x / width * span, 0, 1);
  canvas.setAttribute("aria-label", `Pitch classes of the melody: ${describe(given.classes)}`);
}

// The music's spectrogram over the pitch classes that were asked for; it grows with the samples.
class Picture {
  constructor(rate, duration, classes, frame) {
    Object.assign(this, { rate, duration, classes, frame, drawn: 0, loudness: loudness(rate) });
    const canvas = find("music-picture");
    canvas.width = Math.max(100, Math.min(1000, Math.round(duration * 50)));
    canvas.height = 2 * ROWS + (classes.length ? 72 : 0);
    this.context = canvas.getContext("2d");
    const tune = classes.length ? ` and the melody asked for: ${describe(classes)}` : "";
    canvas.setAttribute("aria-label", `Spectrogram of the music${tune}`);
    document.querySelector(".legend").textContent = `spectrogram, ${LOWEST} Hz to ${HIGHEST / 1000} kHz` +
      (classes.length ? "; below it the melody asked for, C at the bottom, B on top" : "");
    find("music").hidden = false;
  }
  grow(samples) {
    const width = this.context.canvas.width;
    const end = Math.min(width, Math.floor(samples.length / this.rate / this.duration * width + 1e-6));
    for (; this.drawn < end; this.drawn++) {
      const time = (this.drawn + 0.5) / width * this.duration;
      this.loudness(samples, Math.floor(time * this.rate)).forEach((decibels, row) => {
        this.context.fillStyle = `rgb(${heat((decibels - FLOOR) / (LOUDEST - FLOOR))})`;
        this.context.fillRect(this.drawn, 2 * row, 1, 2);
      });
      if (this.classes.length)
        drawClasses(this.context, this.classes, this.frame, this.drawn, time, 2 * ROWS, 6);
    }
  }
}

function movePlayhead(share) { find("playhead").style.left = `${100 * Math.max(0, Math.min(1, share))}%` }
