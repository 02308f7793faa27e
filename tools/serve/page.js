// The page of tools/server.py. Text from outside goes into the page as textContent alone.
"use strict";

const find = id => document.getElementById(id);
const SETTINGS = ["guidance", "temperature", "top_k", "top_p"];
const RESERVE = 2;          // seconds
const QUIET = 0.01;         // of the loudest sample: what is below at both ends of a recording is cut off

let about;                  // what the server told of the model
let melody = null;          // the chosen one: {number, name, seconds, classes, frame}
const melodies = new Map(); // number: the same, for takes that are made again
const takes = new Map();    // number: what the server knows of it
let making = null;          // the take in the making: {job, sound, stopped, finished, take}
let shown = null;           // number of the take in the player
const marked = { A: null, B: null };


// --- small helpers ---------------------------------------------------------------------------------------

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function button(text, label, action) {
  const made = element("button", text, { type: "button", "aria-label": label });
  made.onclick = action;
  return made;
}

const say = text => { find("status").textContent = text };
const complain = text => { find("error").textContent = text };
const seconds = value => `${value.toFixed(1)} s`;

async function ask(path, options) {
  const response = await fetch(path, options).catch(() => null);
  if (!response) throw new Error("the server does not answer; is it still running?");
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

const post = (path, value) => ask(path, { method: "POST", body: JSON.stringify(value) });

function guarded(action) {      // its error is told on the page
  return async (...given) => {
    complain("");
    try { return await action(...given) } catch (error) { complain(error.message) }
  };
}


// --- the melody ------------------------------------------------------------------------------------------

function setMelody(given) {
  melody = given;
  find("given").hidden = !given;
  if (!given) return;
  find("notes").value = "";
  melodies.set(given.number, given);
  find("melody-name").textContent = `${given.name}, ${seconds(given.seconds)}`;
  drawMelody(given);
}

async function upload(content, name) {
  say("reading the melody …");
  try {
    const told = await (await ask("melody", { method: "POST", body: content })).json();
    setMelody({ number: told.melody, name, seconds: told.seconds, classes: told.classes, frame: told.frame });
    say(["Melody ready.", ...told.notes].join(" "));
  } catch (error) { say(""); throw error }
}

async function decode(blob) {       // whatever the browser can decode -> mono samples at the model's rate
  const context = new OfflineAudioContext(1, 1, about.sample_rate);
  const sound = await context.decodeAudioData(await blob.arrayBuffer());
  const mono = new Float32Array(sound.length);
  for (let c = 0; c < sound.numberOfChannels; c++)
    sound.getChannelData(c).forEach((sample, n) => { mono[n] += sample / sound.numberOfChannels });
  return mono;
}

function trim(samples) {            // a recording begins with its first tone
  const loudest = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
  const loud = sample => Math.abs(sample) > Math.max(QUIET * loudest, 1e-4);
  const first = samples.findIndex(loud);
  return first < 0 ? samples.slice(0, 0) : samples.slice(first, samples.findLastIndex(loud) + 1);
}

function toWav(samples, rate) {     // 16 bits, mono
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, letters) => [...letters].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((s, n) => view.setInt16(44 + 2 * n, Math.max(-1, Math.min(1, s)) * 32767, true));
  return view.buffer;
}

async function takeFile(file) {
  if (!file) return;
  try {
    await upload(file, file.name);          // as it is: the server reads what the command line reads
  } catch (refused) {                       // an .m4a or .webm, say
    const samples = await decode(file).catch(() => { throw refused });
    await upload(toWav(samples, about.sample_rate), file.name);
  }
}

let recorder = null, asking = false;

async function record() {
  if (recorder) return recorder.stop();
  if (asking) return;                       // the browser asks whether the microphone may be used
  stop();
  asking = true;
  // these are made for speech, and take a held tone for noise
  const raw = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: raw }).catch(error => {
    throw new Error(`the microphone cannot be used (${error.message})`);
  }).finally(() => { asking = false });
  const pieces = [], began = performance.now();
  recorder = new MediaRecorder(stream);
  recorder.ondataavailable = event => pieces.push(event.data);
  const label = find("record").lastElementChild;
  const clock = setInterval(() => {
    label.textContent = `Done, ${seconds((performance.now() - began) / 1000)}`;
  }, 100);
  recorder.onstop = guarded(async () => {
    clearInterval(clock);
    stream.getTracks().forEach(track => track.stop());
    const kind = recorder.mimeType;
    recorder = null;
    find("record").setAttribute("aria-pressed", "false");
    label.textContent = "Record";
    const samples = trim(await decode(new Blob(pieces, { type: kind })));
    if (!samples.length) throw new Error("nothing was heard; check the microphone and its level");
    await upload(toWav(samples, about.sample_rate), "your recording");
  });
  recorder.start();
  find("record").setAttribute("aria-pressed", "true");
  say("Recording. Press the button again when you are done.");
}


// --- playing while it is made ----------------------------------------------------------------------------

let speaker = null;         // the AudioContext, at the model's rate: pieces join without a seam

class Sound {               // pieces of music, played one after the other
  constructor(rate, channels, from) {
    Object.assign(this, { rate, channels, sources: [], samples: new Float32Array(0), end: 0, skip: from });
    this.waiting = [];
  }
  add(bytes) {
    const values = new Int16Array(bytes.buffer), frames = values.length / this.channels;
    const piece = speaker.createBuffer(this.channels, frames, this.rate);
    const mono = new Float32Array(this.samples.length + frames);
    mono.set(this.samples);
    for (let c = 0; c < this.channels; c++) {
      const side = piece.getChannelData(c);
      for (let n = 0; n < frames; n++) {
        side[n] = values[n * this.channels + c] / 32768;
        mono[this.samples.length + n] += side[n] / this.channels;
      }
    }
    const place = this.samples.length / this.rate;
    this.samples = mono;
    if (place + piece.duration > this.skip) this.waiting.push([piece, Math.max(0, this.skip - place)]);
    this.scheduleAll(RESERVE);
  }
  scheduleAll(reserve) {    // when the model was too slow, the music goes on with so many seconds at hand
    const isDry = this.sources.length && this.end < speaker.currentTime;
    const seconds = this.waiting.reduce((sum, [piece]) => sum + piece.duration, 0);
    this.isSlow ||= isDry;
    if (isDry && seconds < reserve) return;
    for (const [piece, skip] of this.waiting.splice(0)) this.schedule(piece, skip);
  }
  schedule(piece, skip) {
    const soonest = speaker.currentTime + 0.03;
    if (!this.sources.length) this.start = soonest - this.skip;
    else if (this.end < soonest) this.start += soonest - this.end;       // it ran dry: the rest comes later
    const at = Math.max(this.end, soonest);
    const source = speaker.createBufferSource();
    source.buffer = piece;
    source.connect(speaker.destination);
    source.start(at, skip);
    this.sources.push(source);
    this.end = at + piece.duration - skip;
  }
  get time() {
    if (!this.sources.length) return this.skip;
    return Math.min(speaker.currentTime - this.start, this.samples.length / this.rate);
  }
  get isOver() { return speaker.currentTime >= this.end }
  silence() { this.sources.forEach(source => source.stop()) }
}

async function* events(response) {      // lines of JSON as they arrive
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function play(wish) {
  stop();
  find("player").pause();
  const pressed = performance.now();
  speaker ??= new AudioContext({ sampleRate: about.sample_rate });
  speaker.resume();
  const mine = making = { job: null, sound: null, stopped: false, finished: false };
  find("stop").disabled = false;
  say("asking …");
  let picture = null;
  try {
    for await (const event of events(await post("play", wish))) {
      if (event.error) throw new Error(event.error);
      if (event.job) {
        mine.job = event.job;
        if (mine.stopped) post("stop", { job: mine.job }).catch(() => {});
        say(event.queue ? `Waiting: ${event.queue} before you.` : "Starting …");
      }
      if (event.take) {
        picture = new Picture(event.sample_rate, event.duration, event.classes, event.frame);
        mine.duration = event.duration;
        mine.sound = new Sound(event.sample_rate, event.channels, Math.max(0, event.continues_at - 1));
        shown = null;
        find("player").hidden = true;
        find("now").textContent = `take ${event.take}: ${title(wish)}`;
      }
      if (event.audio && !mine.stopped) {
        mine.sound.add(Uint8Array.from(atob(event.audio), letter => letter.charCodeAt(0)));
        if (!mine.firstSound && mine.sound.sources.length) {
          mine.firstSound = performance.now() - pressed + 1000 * (mine.sound.end - speaker.currentTime) -
            1000 * mine.sound.sources[0].buffer.duration;
          find("status").dataset.firstSound = Math.round(mine.firstSound);
          say(`Playing; the first sound came after ${(mine.firstSound / 1000).toFixed(2)} s.`);
          requestAnimationFrame(() => follow(mine));
        }
        if (mine.sound.isSlow) say("Playing with pauses: the model is slower than the music here.");
        picture.grow(mine.sound.samples);
      }
      if ("done" in event) {
        mine.finished = true;
        mine.sound?.scheduleAll(0);
        if (event.done) addTake(event.done);
        forget(event.forgotten || []);
        if (mine.stopped) finish(mine, event.done);
        mine.take = event.done;
      }
    }
    if (!mine.finished) throw new Error("the connection to the server broke off");
  } catch (error) {
    finish(mine, null);
    say("");
    throw error;
  }
}

function follow(mine) {                 // moves the playhead while the music in the making is heard
  if (making !== mine || mine.stopped) return;
  movePlayhead(mine.sound.time / mine.duration);
  if (mine.finished && mine.sound.isOver) return finish(mine, mine.take);
  requestAnimationFrame(() => follow(mine));
}

function finish(mine, take) {
  if (making !== mine) return;
  making = null;
  find("stop").disabled = true;
  if (!take) return say("Stopped.");
  const part = `Stopped; take ${take.take} has ${seconds(take.seconds)}.`;
  say(take.finished ? `Take ${take.take} is ready.` : part);
  show(take.take, false);
}

function stop() {
  find("player").pause();
  const mine = making;
  if (!mine || mine.stopped) return;
  mine.stopped = true;
  mine.sound?.silence();
  if (mine.finished) return finish(mine, mine.take);
  if (mine.job) post("stop", { job: mine.job }).catch(() => {});
  say("Stopping …");
}


// --- takes -----------------------------------------------------------------------------------------------

const title = wish => wish.text ? `“${wish.text}”` : "no words";

function addTake(take) {
  takes.set(take.take, take);
  const wish = take.wish, n = take.take;
  const item = element("li", "", { id: `take-${n}` });
  const facts = [`take ${n}`, seconds(take.seconds), `seed ${wish.seed}`];
  if (wish.melody !== null) facts.push(`melody: ${melodies.get(wish.melody)?.name ?? wish.melody}`);
  if (wish.notes) facts.push(`notes: ${wish.notes}`);
  if (wish.continue !== null) facts.push(`continues take ${wish.continue}`);
  for (const name of SETTINGS) if (wish[name] !== null) facts.push(`${name} ${wish[name]}`);
  if (!take.finished) facts.push("stopped");
  const actions = element("div", "", { class: "row" });
  actions.append(button("Play", `Play take ${n}`, guarded(() => show(n, true))));
  for (const side of ["A", "B"]) {
    const mark = button(side, `Take ${n} is side ${side} of the comparison`, () => markAs(side, n));
    mark.setAttribute("aria-pressed", "false");
    mark.dataset.side = side;
    actions.append(mark);
  }
  actions.append(
    button("Continue", `Continue take ${n}`,
      guarded(() => play({ ...wish, ...lengthAndSeed(), continue: n }))),
    button("Another seed", `Take ${n} again with another seed`,
      guarded(() => play({ ...wish, seed: randomSeed() }))));
  const links = element("div", "Save: ", { class: "links" });
  for (const kind of ["wav", "flac", "mp3", "json"])
    links.append(element("a", kind, { href: `take/${n}.${kind}`, download: `take_${n}.${kind}`,
      "aria-label": `Save take ${n} as ${kind}` }));
  if (wish.melody !== null)
    links.append(element("a", "melody", { href: `melody/${wish.melody}.wav`,
      download: `melody_${wish.melody}.wav`, "aria-label": `Save the melody of take ${n}` }));
  item.append(element("b", title(wish)), element("p", facts.join(" · ")), actions, links);
  find("takes").prepend(item);
}

function forget(numbers) {
  for (const n of numbers) {
    takes.delete(n);
    find(`take-${n}`)?.remove();
  }
  if (numbers.length)
    find("notice").textContent = `Only so many takes are kept. Gone to make room: ${numbers.join(", ")}.`;
}

let source = "", asked = 0;

async function show(number, begin, at = 0) {        // a take in the player
  const take = takes.get(number), player = find("player"), mine = ++asked;
  if (begin) stop();
  if (shown !== number) {
    const blob = await (await ask(`take/${number}.wav`)).blob();
    if (mine !== asked) return;         // meanwhile another one was asked for
    URL.revokeObjectURL(source);
    source = player.src = URL.createObjectURL(blob);
    shown = number;
    player.hidden = false;
    find("now").textContent = `take ${number}: ${title(take.wish)}`;
    for (const item of find("takes").children)
      item.classList.toggle("current", item.id === `take-${number}`);
    const picture = new Picture(about.sample_rate, take.seconds, take.classes, take.frame);
    decode(blob).then(samples => { if (shown === number) picture.grow(samples) });
    movePlayhead(0);
  }
  player.currentTime = at;
  if (!begin) return;
  await player.play().catch(error => { if (mine === asked) throw error });
  if (mine === asked) say(`Playing take ${number}.`);
}

function markAs(side, number) {
  marked[side] = number;
  for (const mark of document.querySelectorAll(`[data-side=${side}]`))
    mark.setAttribute("aria-pressed", String(mark.closest("li").id === `take-${number}`));
  const { A, B } = marked;
  find("compare").hidden = A === null || B === null;
  find("compare").firstElementChild.textContent =
    `Compare take ${A} (A) with take ${B} (B): Switch, or key x, goes to the same place of the other`;
}

function switchSides() {
  const other = shown === marked.A ? marked.B : marked.A;
  if (other === null || !takes.has(other)) throw new Error("mark two takes as A and B first");
  const time = find("player").currentTime;
  return show(other, true, time);
}


// --- the form --------------------------------------------------------------------------------------------

const randomSeed = () => Math.floor(Math.random() * 2 ** 31);
const number = id => find(id).value === "" ? null : Number(find(id).value);

function lengthAndSeed() {
  if (find("new-seed").checked) find("seed").value = randomSeed();
  return { duration: number("duration"), seed: number("seed") };
}

function wishOfForm() {
  const wish = { text: find("text").value.trim() || null, ...lengthAndSeed() };
  const notes = find("notes").value.trim();
  if (notes) Object.assign(wish, { notes, bpm: number("bpm") });
  else if (melody) wish.melody = melody.number;
  for (const name of SETTINGS) wish[name] = number(name);
  return wish;
}

const wordsOf = text => text.toLowerCase().match(/[\p{L}\p{N}_]+/gu) ?? [];

function showWords() {              // which chips are in the text, and what the model does not know of it
  const used = new Set(wordsOf(find("text").value));
  for (const chip of find("chips").children)
    chip.setAttribute("aria-pressed", String(used.has(chip.textContent)));
  if (!about.words) return;
  const read = Object.keys(about.readings).filter(    // "up-tempo" is two words here
    word => used.has(word) || word.includes("-") && find("text").value.toLowerCase().includes(word));
  const known = [...about.words, ...about.fillers, ...read.flatMap(wordsOf)];
  const unknown = [...used].filter(word => !known.includes(word));
  const told = read.map(word => `${word} is not known: read as ${about.readings[word]}`);
  if (unknown.length) told.push(`This model does not know: ${unknown.join(", ")}`);
  find("unknown").textContent = told.join(". ");
}

function toggleWord(word) {
  const text = find("text"), words = wordsOf(text.value);
  const others = text.value.split(/\s+/).filter(other => wordsOf(other)[0] !== word);
  if (words.includes(word)) text.value = others.join(" ");
  else text.value = `${text.value.trim()} ${word}`.trim();
  showWords();
}

async function begin() {
  about = await (await ask("about")).json();
  find("checkpoint").textContent = about.checkpoint;
  find("melody").hidden = !about.melody;
  find("words").hidden = !about.text;
  find("duration").max = about.longest;
  if (about.words) {
    find("known").hidden = false;
    find("known").open = innerWidth > 600;
    const isNumber = word => /^\d+$/.test(word);
    for (const word of about.words)
      if (!isNumber(word)) find("chips").append(button(word, word, () => toggleWord(word)));
    const numbers = about.words.filter(isNumber);
    if (numbers.length) find("numbers").textContent = `and ${numbers.join(" ")}`;
  }
  for (const name of SETTINGS) {
    const label = element("label", name.replace("_", " ") + " ");
    label.append(element("input", "", { type: "number", id: name, step: "any",
      placeholder: about.settings[name] }));
    find("settings").append(label);
  }
  showWords();
  for (const take of await (await ask("takes")).json()) addTake(take);

  find("text").oninput = showWords;
  find("record").onclick = guarded(record);
  find("file").onchange = guarded(async () => {
    const file = find("file").files[0];
    find("file").value = "";
    await takeFile(file);
  });
  find("remove").onclick = () => { setMelody(null); find("record").focus(); say("No melody.") };
  find("notes").oninput = () => { if (find("notes").value.trim()) setMelody(null) };
  find("wish").onsubmit = event => { event.preventDefault(); guarded(play)(wishOfForm()) };
  find("stop").onclick = stop;
  find("switch").onclick = guarded(switchSides);
  const player = find("player");
  const move = () => {
    movePlayhead(player.currentTime / player.duration);
    if (!player.paused) requestAnimationFrame(move);
  };
  player.onplay = move;
  player.onseeked = move;
  find("picture").onclick = event => {
    const box = find("picture").getBoundingClientRect();
    if (shown !== null) player.currentTime = (event.clientX - box.left) / box.width * player.duration;
  };
  document.onkeydown = event => {
    if (event.key === "Escape") stop();
    if (event.key === "x" && event.target.tagName !== "INPUT") guarded(switchSides)();
  };
  document.ondragover = event => { event.preventDefault(); document.body.classList.add("dragging") };
  document.ondragleave = () => document.body.classList.remove("dragging");
  document.ondrop = guarded(async event => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    await takeFile(event.dataTransfer.files[0]);
  });
  document.body.dataset.ready = "yes";
}

guarded(begin)();
