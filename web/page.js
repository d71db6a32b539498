// Load the captioner of this folder, and caption what is dropped.
import { Captioner } from "./captioner.js";

const MAX_SIDE = 4096; // pixels; larger images are shrunk first
const MAP_SIZE = 256; // pixels of an attention map
const element = (id) => document.getElementById(id);

async function fetchJson(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response.json();
}

// A file's bytes; onBytes gets the number of those that have arrived since.
async function fetchBytes({ name, bytes }, onBytes) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const content = new Uint8Array(bytes);
  let place = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (place + value.length > bytes) throw new Error(`${name} is larger than model.json has it: export it again`);
    content.set(value, place);
    place += value.length;
    onBytes(value.length);
  }
  if (place < bytes) throw new Error(`${name} ended after ${place} of ${bytes} bytes: reload the page`);
  return content;
}

const asked = new URLSearchParams(location.search); // ?device=wasm&dtype=fp32 chooses both

// WebGPU where there is one, else WASM.
async function chooseDevice() {
  if (asked.get("device") === "wasm") return { name: "wasm", hasFloat16: false };
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter ? { name: "webgpu", hasFloat16: adapter.features.has("shader-f16") } : { name: "wasm", hasFloat16: false };
}

function chooseDtype(files, device) {
  const wanted = device.name === "wasm" ? ["q8", "fp32"] : device.hasFloat16 ? ["fp16", "fp32"] : ["fp32"];
  return [asked.get("dtype"), ...wanted].find((dtype) => dtype in files) ?? Object.keys(files)[0];
}

async function load() {
  const [model, settings, device] = await Promise.all([
    fetchJson("model.json"), fetchJson("generation_config.json"), chooseDevice(),
  ]);
  const dtype = chooseDtype(model.files, device);
  const runtime = model.runtime[device.name];
  const wanted = { ...model.files[dtype], preprocess: model.preprocess, wasm: runtime.wasm };
  const total = Object.values(wanted).reduce((sum, { bytes }) => sum + bytes, 0);
  let arrived = 0;
  const onBytes = (bytes) => { element("progress").value = (arrived += bytes) / total; };
  const ort = await import(`./${runtime.script}`);
  const contents = {};
  for (const [part, file] of Object.entries(wanted)) contents[part] = await fetchBytes(file, onBytes);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = contents.wasm.buffer;
  ort.env.wasm.wasmPaths = { mjs: new URL(runtime.loader, location.href).href };
  const sessions = {};
  for (const part of ["preprocess", "encoder", "step"]) {
    const providers = part === "preprocess" ? ["wasm"] : [device.name];
    sessions[part] = await ort.InferenceSession.create(contents[part], { executionProviders: providers });
  }
  element("device").textContent = `${device.name === "wasm" ? "WASM" : "WebGPU"}, ${dtype}`;
  return new Captioner(ort, sessions, model, settings);
}

async function readImage(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

function addCard(file) {
  const card = document.createElement("li");
  card.innerHTML = `<figure><div class="frame"><div class="image"><img alt=""><canvas hidden></canvas></div></div>
    <figcaption><p class="caption"></p><p class="foot"></p></figcaption></figure>`;
  const image = card.querySelector("img");
  image.src = URL.createObjectURL(file);
  image.alt = file.name;
  card.querySelector(".foot").textContent = file.name;
  element("cards").prepend(card);
  return card;
}

// Darken the image where the model does not attend; null restores it.
function showAttention(card, attention, crop) {
  const canvas = card.querySelector("canvas");
  canvas.hidden = !attention;
  if (!attention) return;
  const side = Math.floor(Math.sqrt(attention.length)); // what stands before the grid is no position of it
  const grid = attention.slice(attention.length - side * side);
  const largest = grid.reduce((one, other) => Math.max(one, other)) || 1;
  const map = new ImageData(side, side);
  grid.forEach((weight, cell) => map.data.set([8, 8, 20, 0.78 * 255 * (1 - weight / largest)], 4 * cell));
  const small = new OffscreenCanvas(side, side);
  small.getContext("2d").putImageData(map, 0, 0);
  canvas.width = canvas.height = MAP_SIZE;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high"; // a few cells, interpolated over the whole image
  context.drawImage(small, 0, 0, MAP_SIZE, MAP_SIZE);
  const { clientWidth: width, clientHeight: height } = card.querySelector("img");
  const [across, down] = crop ? new Array(2).fill(crop * Math.min(width, height)) : [width, height];
  Object.assign(canvas.style, {
    width: `${across}px`, height: `${down}px`, left: `${(width - across) / 2}px`, top: `${(height - down) / 2}px`,
  });
}

function showTokens(card, tokens, crop) {
  const caption = card.querySelector(".caption");
  caption.replaceChildren(...tokens.map(({ text, attention }) => {
    const span = document.createElement("span");
    span.className = "token";
    span.textContent = text;
    span.tabIndex = 0;
    for (const event of ["mouseenter", "focus"]) span.addEventListener(event, () => showAttention(card, attention, crop));
    for (const event of ["mouseleave", "blur"]) span.addEventListener(event, () => showAttention(card, null));
    return span;
  }));
}

async function captionFile(captioner, file, card) {
  try {
    const image = await readImage(file).catch(() => { throw new Error("this file does not decode as an image"); });
    const started = performance.now();
    const crop = captioner.model.center_crop;
    const show = (tokens) => showTokens(card, tokens, crop);
    const tokens = await captioner.caption(image, Number(element("beams").value), show);
    show(tokens);
    const milliseconds = performance.now() - started;
    card.dataset.milliseconds = milliseconds;
    card.querySelector(".foot").textContent = `${file.name}, ${Math.round(milliseconds)} ms`;
    element("hint").hidden = !tokens.some(({ attention }) => attention);
    card.classList.add("done");
  } catch (error) {
    card.querySelector(".foot").textContent = `${file.name}: ${error.message}`;
    card.classList.add("failed");
  }
}

function accept(captioner) {
  let waiting = Promise.resolve(); // one image after the other
  const take = (files) => {
    for (const file of files) {
      const card = addCard(file);
      waiting = waiting.then(() => captionFile(captioner, file, card));
    }
  };
  element("files").addEventListener("change", (event) => {
    take([...event.target.files]);
    event.target.value = "";
  });
  const drop = element("drop");
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take([...event.dataTransfer.files]);
  });
  element("controls").addEventListener("submit", (event) => event.preventDefault());
}

try {
  const captioner = await load();
  const saved = captioner.settings.num_beams ?? 1;
  for (const number of [...new Set([1, 3, 5, saved])].sort((one, other) => one - other)) {
    element("beams").add(new Option(number === 1 ? "1 (greedy)" : number, number, number === saved, number === saved));
  }
  document.title = captioner.model.title;
  element("title").textContent = captioner.model.title;
  accept(captioner);
  element("controls").hidden = false;
} catch (error) {
  element("problem").textContent = `The model cannot be loaded: ${error.message}`;
  element("problem").hidden = false;
} finally {
  element("loading").hidden = true;
}
