// Caption images with an exported captioner: greedy decoding and beam search as transformers' generate() has them.
// The same as captioning/onnx_decoding.py, for one image at a time, on onnxruntime-web.

const LOWEST = -1e9; // score of what is not to be chosen, as in generate()
const DEFAULT_NEW_TOKENS = 20;

export class Captioner {
  // sessions: {preprocess, encoder, step}; model: model.json; settings: generation_config.json
  constructor(ort, sessions, model, settings) {
    Object.assign(this, { ort, sessions, model, settings });
    this.start = [settings.decoder_start_token_id ?? settings.bos_token_id].flat(2);
    this.eos = [settings.eos_token_id ?? []].flat();
    this.minLength = this.lengthLimit("min") ?? 0;
    this.maxLength = this.lengthLimit("max") ?? this.start.length + DEFAULT_NEW_TOKENS;
  }

  lengthLimit(kind) {
    const added = this.settings[`${kind}_new_tokens`];
    return added == null ? this.settings[`${kind}_length`] : added + this.start.length;
  }

  // Caption an ImageData. onTokens gets the tokens so far, [{text, attention}], of greedy decoding.
  async caption(image, numBeams = 1, onTokens = () => {}) {
    const encoded = await this.encode(image);
    if (numBeams === 1) return this.greedy(encoded, onTokens);
    const ids = await this.beams(encoded, numBeams);
    return this.greedy(encoded, onTokens, ids); // once more, for the attention of each token
  }

  async encode({ data, width, height }) {
    const pixels = new Float32Array(3 * width * height);
    for (let place = 0, size = width * height; place < size; place++) {
      for (let channel = 0; channel < 3; channel++) pixels[channel * size + place] = data[4 * place + channel];
    }
    const input = new this.ort.Tensor("float32", pixels, [1, 3, height, width]);
    const { pixel_values } = await this.sessions.preprocess.run({ pixels: input });
    return this.sessions.encoder.run({ pixel_values });
  }

  firstState(numRows) {
    const sizes = { batch: numRows, past: 0 };
    const state = {};
    for (const [name, shape] of Object.entries(this.model.states)) {
      const dims = shape.map((size) => sizes[size] ?? size);
      state[name] = new this.ort.Tensor("float32", new Float32Array(product(dims)), dims);
    }
    return state;
  }

  // Logits of each row, and the state and attention after tokens, rows of ids of which the first is at `position`.
  async step(rows, position, encoded, state) {
    const ids = BigInt64Array.from(rows.flat(), BigInt);
    const outputs = await this.sessions.step.run({
      input_ids: new this.ort.Tensor("int64", ids, [rows.length, rows[0].length]),
      position: new this.ort.Tensor("int64", BigInt64Array.of(BigInt(position)), []),
      ...encoded,
      ...state,
    });
    const next = {};
    for (const name of Object.keys(state)) next[name] = outputs[name.replace("state.", "new.")];
    return { logits: splitRows(outputs.logits), attention: outputs.attention?.data, state: next };
  }

  // Rows of every tensor of the state, in this order.
  select(state, rows) {
    const selected = {};
    for (const [name, tensor] of Object.entries(state)) {
      const axis = this.model.states[name].indexOf("batch");
      selected[name] = takeRows(this.ort, tensor, axis, rows);
    }
    return selected;
  }

  // The most probable token at each step, or the given ones.
  async greedy(encoded, onTokens, given = null) {
    let ids = [...this.start];
    let fresh = ids;
    let state = this.firstState(1);
    const tokens = new Tokens(this.model.tokens);
    while (ids.length < this.maxLength) {
      const step = await this.step([fresh], ids.length - fresh.length, encoded, state);
      state = step.state;
      const scores = step.logits[0];
      this.applyRules(scores, ids);
      const token = given ? given[ids.length - this.start.length] : argmax(scores);
      if (token === undefined || this.eos.includes(token)) break;
      fresh = [token];
      ids = [...ids, token];
      tokens.add(token, step.attention);
      onTokens(tokens.list);
    }
    return tokens.list;
  }

  async beams(encoded, numBeams) {
    const { settings, start } = this;
    const penalty = settings.length_penalty ?? 1;
    const early = settings.early_stopping ?? false;
    const repeated = {};
    for (const [name, tensor] of Object.entries(encoded)) {
      repeated[name] = takeRows(this.ort, tensor, 0, new Array(numBeams).fill(0));
    }
    let running = Array.from({ length: numBeams }, (_, beam) => ({ ids: [...start], score: beam ? LOWEST : 0 }));
    let finished = Array.from({ length: numBeams }, () => ({ ids: [...start], score: LOWEST, ended: false }));
    let state = this.firstState(numBeams);
    let improvable = true;
    for (let length = start.length, read = 0; length < this.maxLength; length++) {
      const step = await this.step(running.map(({ ids }) => ids.slice(read)), read, repeated, state);
      read = length;
      const continued = this.continuations(running, step.logits, numBeams);
      const isFull = early === true && finished.every(({ ended }) => ended);
      const endedNow = continued.map((beam, place) => {
        const counts = beam.ended && place < numBeams && improvable && !isFull;
        const score = beam.score / (length + 1 - start.length) ** penalty;
        return { ids: beam.ids, ended: beam.ended && place < numBeams, score: counts ? score : score + LOWEST };
      });
      running = best(continued.map((beam) => ({ ...beam, score: beam.score + (beam.ended ? LOWEST : 0) })), numBeams);
      state = this.select(step.state, running.map(({ parent }) => parent));
      finished = best([...finished, ...endedNow], numBeams);
      const longest = early === "never" && penalty > 0 ? this.maxLength : length + 1;
      const possible = running[0].score / (longest - start.length) ** penalty;
      const worst = Math.min(...finished.map(({ score }) => score));
      improvable &&= finished.some(({ ended }) => possible > (ended ? worst : LOWEST));
      const stops = early === true && finished.every(({ ended }) => ended);
      if (!improvable || stops || continued.every(({ ended }) => ended)) break;
    }
    return finished[0].ids.slice(start.length);
  }

  // The best captions that are one token longer, enough for all beams to go on.
  continuations(running, logits, numBeams) {
    const number = Math.max(2, 1 + this.eos.length) * numBeams;
    const candidates = [];
    running.forEach(({ ids, score }, parent) => {
      const scores = logSoftmax(logits[parent]);
      this.applyRules(scores, ids);
      const places = Array.from(scores.keys()).sort((one, other) => scores[other] - scores[one]).slice(0, number);
      for (const token of places) candidates.push({ parent, token, score: score + scores[token] });
    });
    return best(candidates, number).map(({ parent, token, score }) => {
      const ids = [...running[parent].ids, token];
      return { ids, score, parent, ended: this.eos.includes(token) || ids.length >= this.maxLength };
    });
  }

  // Change the scores of the next token after ids, in place, as the generation config has it.
  applyRules(scores, ids) {
    const { settings } = this;
    for (const [[token, ...more], bias] of settings.sequence_bias ?? []) if (!more.length) scores[token] += bias;
    const penalty = settings.repetition_penalty ?? 1;
    if (penalty !== 1) for (const token of new Set(ids)) scores[token] *= scores[token] < 0 ? penalty : 1 / penalty;
    if (ids.length < this.minLength) for (const token of this.eos) scores[token] = -Infinity;
    for (const token of repeatedTokens(ids, settings.no_repeat_ngram_size ?? 0)) scores[token] = -Infinity;
    for (const [token, ...more] of settings.bad_words_ids ?? []) {
      if (!more.length && !this.eos.includes(token)) scores[token] = -Infinity;
    }
    for (const token of settings.suppress_tokens ?? []) scores[token] = -Infinity;
  }
}

// The texts of token ids as they come; what is no whole character by itself stands together.
class Tokens {
  constructor(pieces) {
    Object.assign(this, { pieces, list: [], decoder: new TextDecoder(), isOpen: false });
  }

  add(id, attention) {
    const bytes = Uint8Array.from(this.pieces[id], (letter) => letter.charCodeAt(0));
    let text = this.decoder.decode(bytes, { stream: true });
    if (!this.list.length) text = text.trimStart();
    const last = this.list.at(-1);
    if (this.isOpen) last.text += text;
    else this.list.push({ text, attention });
    this.isOpen = bytes.length > 0 && text === "" && this.list.length > 0;
  }
}

// The tokens that would complete an n-gram of this size that ids have already.
export function repeatedTokens(ids, size) {
  if (!size || ids.length < size) return [];
  const last = ids.slice(ids.length - size + 1).join();
  const repeated = [];
  for (let first = 0; first + size <= ids.length; first++) {
    if (ids.slice(first, first + size - 1).join() === last) repeated.push(ids[first + size - 1]);
  }
  return repeated;
}

function best(beams, number) {
  return [...beams].sort((one, other) => other.score - one.score).slice(0, number);
}

function logSoftmax(logits) {
  const largest = logits.reduce((one, other) => Math.max(one, other));
  const sum = logits.reduce((total, logit) => total + Math.exp(logit - largest), 0);
  return logits.map((logit) => logit - largest - Math.log(sum));
}

function argmax(scores) {
  return scores.reduce((place, score, other) => (score > scores[place] ? other : place), 0);
}

const product = (numbers) => numbers.reduce((one, other) => one * other, 1);

function splitRows(tensor) {
  const size = tensor.dims.at(-1);
  return Array.from({ length: tensor.dims[0] }, (_, row) => tensor.data.slice(row * size, (row + 1) * size));
}

function takeRows(ort, tensor, axis, rows) {
  const { dims, data } = tensor;
  const inner = product(dims.slice(axis + 1));
  const outer = product(dims.slice(0, axis));
  const taken = new Float32Array(outer * rows.length * inner);
  for (let place = 0; place < outer; place++) {
    rows.forEach((row, number) => {
      const first = (place * dims[axis] + row) * inner;
      taken.set(data.subarray(first, first + inner), (place * rows.length + number) * inner);
    });
  }
  return new ort.Tensor("float32", taken, [...dims.slice(0, axis), rows.length, ...dims.slice(axis + 1)]);
}
