'use strict';
(() => {
const pick = (id) => document.getElementById(id);
const data = JSON.parse(pick('data').textContent);
const {images, classes} = data;
const ERRORS = ['miss', 'wrong class', 'false alarm'];
const SEVERITY = {'miss': 0, 'wrong class': 0, 'false alarm': 1, 'hit': 2, 'correct': 3};

/** An element with properties (`data-`, `aria-` and others with a dash as attributes) and children. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-')) made.setAttribute(name, value);
    else if (name === 'style') Object.entries(value).forEach(([k, v]) => made.style.setProperty(k, v));
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function shape(tag, attributes, text = '') {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const kept = {  // in this browser, where it allows that
  read(key) { try { return localStorage.getItem(key); } catch { return null; } },
  write(key, value) {
    try { localStorage.setItem(key, value); return true; } catch { return false; }
  },
};

/** Say what went wrong, or, with nothing to say, take it back. */
function tell(text) {
  pick('trouble').textContent = text;
  pick('trouble').hidden = !text;
}

// ---- Theme --------------------------------------------------------------------------------------

const THEMES = ['system', 'light', 'dark'];
function setTheme(name) {
  document.documentElement.style.colorScheme = name === 'system' ? '' : name;
  pick('theme').textContent = `Theme: ${name}`;
  pick('theme').dataset.theme = name;
}
setTheme(THEMES.includes(kept.read('pipeline-theme')) ? kept.read('pipeline-theme') : 'system');
pick('theme').addEventListener('click', () => {
  const next = THEMES[(THEMES.indexOf(pick('theme').dataset.theme) + 1) % THEMES.length];
  setTheme(next);
  kept.write('pipeline-theme', next);
});

// ---- Decisions at a threshold -------------------------------------------------------------------

let chosen = null;  // the threshold of all images; null: each image's own, as evaluated

const thresholdOf = (image) => chosen ?? image.threshold;
const topScore = (image) => image.predictions.length ? image.predictions[0].score : -Infinity;
const isDefective = (image) => image.label >= 0;

/** Whether no box counts on an image that the anomaly detector finds anomalous. */
const isUnknown = (image) => !!image.anomaly && image.anomaly.score >= image.anomaly.threshold && topScore(image) < thresholdOf(image);

function verdictAt(image, threshold) {
  let verdict = image.verdicts[0][1];
  for (const [score, from] of image.verdicts.slice(1)) if (score >= threshold) verdict = from;
  return verdict;
}

/** What is decided about images, given the threshold of each, and how much of it is wrong. */
function decide(list, threshold) {
  const sum = {images: list.length, right: 0, defective: 0, misses: 0, good: 0, falseAlarms: 0,
    defects: 0, lost: 0, boxes: 0};
  for (const image of list) {
    const from = threshold(image);
    const called = topScore(image) >= from;
    const decision = called ? image.predictions[0].class : -1;
    sum.right += decision === image.label;
    sum.defects += image.truth.length;
    sum.lost += image.truth.filter((one) => one.score === null || one.score < from).length;
    if (isDefective(image)) {
      sum.defective += 1;
      sum.misses += !called;
    } else {
      sum.good += 1;
      sum.falseAlarms += called;
      sum.boxes += image.predictions.filter((one) => one.score >= from).length;
    }
  }
  return sum;
}

/** The threshold where wrong decisions cost least, as in pipeline/data/costs.py. */
function cheapest(list, costs) {
  const scored = list.map((image) => [topScore(image), isDefective(image)]).sort((a, b) => a[0] - b[0]);
  const inside = scored.map(([score]) => score).filter((score) => score > 0 && score < 1);
  const edges = [...new Set([0, ...inside, 1])];
  let misses = 0;
  let alarms = scored.filter(([, defective]) => !defective).length;
  let next = 0;
  const spans = [];  // [lower, upper, cost], those of equal cost as one
  for (let i = 1; i < edges.length; i++) {
    for (; next < scored.length && scored[next][0] < edges[i]; next++) {
      if (scored[next][1]) misses += 1;
      else alarms -= 1;
    }
    const cost = costs.miss * misses + costs.falseAlarm * alarms;
    if (spans.length && spans.at(-1)[2] === cost) spans.at(-1)[1] = edges[i];
    else spans.push([edges[i - 1], edges[i], cost]);
  }
  const least = Math.min(...spans.map((span) => span[2]));
  const best = spans.filter((span) => span[2] === least)
    .reduce((a, b) => (b[1] - b[0] >= a[1] - a[0] ? b : a));
  return (best[0] + best[1]) / 2;
}

const parts = [...new Set(images.filter((image) => image.measured).map((image) => image.part))];
const others = [...new Set(images.filter((image) => !image.measured).map((image) => image.part))];
if (parts.length > 1) pick('part').append(element('option', {value: ''}, 'all folds'));
pick('part').append(...[...parts, ...others].map((part) => element('option', {value: part}, part)));

const counted = () => images.filter((image) =>
  pick('part').value ? image.part === pick('part').value : image.measured);
const costs = () => ({
  miss: Math.max(0, Number(pick('miss').value) || 0),
  falseAlarm: Math.max(0, Number(pick('false-alarm').value) || 0),
});
const decimals = (value) => value.toFixed(3);
const share = (count, all) => all ? `${count} of ${all}` : '–';

const ROWS = [
  ['image decision right', (d) => `${share(d.right, d.images)}${d.images ? ` (${(100 * d.right / d.images).toFixed(1)} %)` : ''}`],
  ['missed: defective images called good', (d) => share(d.misses, d.defective)],
  ['false alarms: good images called defective', (d) => share(d.falseAlarms, d.good)],
  ['defects without a box of their class', (d) => share(d.lost, d.defects)],
  ['boxes on good images', (d) => d.good ? `${d.boxes}` : '–'],
  ['cost', (d, c) => Number((c.miss * d.misses + c.falseAlarm * d.falseAlarms).toFixed(6)).toString()],
];
const cells = ROWS.map(([name]) => {
  const columns = ['evaluated', 'now', 'cheapest'].map((column) => element('td', {className: column === 'now' ? 'now' : ''}));
  const row = element('tr', {}, element('th', {scope: 'row'}, name), ...columns);
  pick('decisions').tBodies[0].append(row);
  return columns;
});

let onCheapest = 0.5;
function showDecisions() {
  const list = counted();
  const price = costs();
  onCheapest = cheapest(list, price);
  const own = new Set(list.map((image) => image.threshold)).size > 1;
  const evaluated = own ? "each fold's own" : decimals(list.length ? list[0].threshold : 0);
  pick('at-evaluated').textContent = evaluated;
  pick('at-now').textContent = chosen === null ? evaluated : decimals(chosen);
  pick('at-cheapest').textContent = decimals(onCheapest);
  const decided = [(image) => image.threshold, thresholdOf, () => onCheapest].map((at) => decide(list, at));
  ROWS.forEach(([, text], row) => decided.forEach((sums, column) => {
    cells[row][column].textContent = text(sums, price);
  }));
  pick('cost-command').textContent = `pipeline evaluate … --cost miss=${price.miss},false-alarm=${price.falseAlarm}`;
  drawHistogram(list);
}

const BINS = 50;
function drawHistogram(list) {
  const bins = {good: Array(BINS).fill(0), defective: Array(BINS).fill(0)};
  for (const image of list) {
    const bin = Math.min(BINS - 1, Math.floor(Math.max(0, topScore(image)) * BINS));
    bins[isDefective(image) ? 'defective' : 'good'][bin] += 1;
  }
  const drawn = [shape('line', {class: 'zero', x1: 0, x2: 1000, y1: 100, y2: 100})];
  for (const [kind, counts] of Object.entries(bins)) {
    const most = Math.max(1, ...counts);
    counts.forEach((count, bin) => {
      if (!count) return;
      const height = 90 * count / most;
      const y = kind === 'good' ? 100 - height : 100;
      const bar = shape('rect', {class: kind, x: bin * 1000 / BINS + 1, width: 1000 / BINS - 2, y, height});
      bar.append(shape('title', {}, `${count} ${kind}, score ${bin / BINS} to ${(bin + 1) / BINS}`));
      drawn.push(bar);
    });
  }
  const lines = [...new Set(list.map((image) => image.threshold))].map((value) => ['evaluated', value]);
  if (chosen !== null) lines.push(['cut', chosen]);
  else if (lines.length === 1) lines.push(['cut', lines[0][1]]);
  drawn.push(...lines.map(([name, value]) => shape('line', {class: name, x1: 1000 * value, x2: 1000 * value, y1: 0, y2: 200})));
  pick('histogram').setAttribute('viewBox', '0 0 1000 200');
  pick('histogram').replaceChildren(...drawn);
}

function setThreshold(value) {
  chosen = value;
  const own = images.map((image) => image.threshold).sort((a, b) => a - b);
  pick('slider').value = value ?? own[Math.floor(own.length / 2)] ?? 0.5;
  showDecisions();
  refreshGallery();
}

let waiting = false;
pick('slider').addEventListener('input', () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; setThreshold(Number(pick('slider').value)); });
});
function slideTo(event) {
  const box = pick('histogram').getBoundingClientRect();
  const at = (event.clientX - box.left) / box.width;
  setThreshold(Math.round(1000 * Math.min(1, Math.max(0, at))) / 1000);
}
pick('histogram').addEventListener('pointerdown', (event) => {
  pick('histogram').setPointerCapture(event.pointerId);
  slideTo(event);
});
pick('histogram').addEventListener('pointermove', (event) => { if (event.buttons) slideTo(event); });
pick('use-cheapest').addEventListener('click', () => setThreshold(onCheapest));
pick('use-evaluated').addEventListener('click', () => setThreshold(null));
pick('miss').value = data.cost ? data.cost.miss : 50;
pick('false-alarm').value = data.cost ? data.cost.false_alarm : 1;
for (const id of ['miss', 'false-alarm', 'part']) pick(id).addEventListener('input', showDecisions);

// ---- Masks and boxes ----------------------------------------------------------------------------

/** The run lengths in COCO's compressed text: base 32 with sign, from the third on as differences. */
function runLengths(text) {
  const counts = [];
  for (let at = 0; at < text.length;) {
    let value = 0;
    let shift = 0;
    let code;
    do {
      code = text.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  return counts;
}

/** A mask as bytes, row by row, in a raster of `width`; a smaller raster keeps every pixel's place. */
function rasterOf(rle, width) {
  const [fullHeight, fullWidth] = rle.size;
  const scale = width / fullWidth;
  const height = Math.max(1, Math.round(fullHeight * scale));
  const bits = new Uint8Array(width * height);
  let at = 0;
  runLengths(rle.counts).forEach((length, run) => {
    if (run % 2) {
      for (let from = at; from < at + length;) {  // column by column
        const x = Math.floor(from / fullHeight);
        const y = from % fullHeight;
        const end = Math.min(at + length - from, fullHeight - y) + y;
        const column = Math.min(width - 1, Math.floor(x * scale));
        const last = Math.min(height - 1, Math.floor((end - 1) * scale));
        for (let row = Math.floor(y * scale); row <= last; row++) bits[row * width + column] = 1;
        from += end - y;
      }
    }
    at += length;
  });
  return {bits, width, height};
}

/** Paint a mask into pixels: filled, or its inner edge of some thickness alone. */
function paint(pixels, {bits, width, height}, colour, alpha, thickness = 0) {
  const [red, green, blue] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const isEdge = (x, y) => {
    for (let d = 1; d <= thickness; d++) {
      if (x < d || y < d || x + d >= width || y + d >= height) return true;
      const i = y * width + x;
      if (!(bits[i - d] && bits[i + d] && bits[i - d * width] && bits[i + d * width])) return true;
    }
    return false;
  };
  for (let i = 0; i < bits.length; i++) {
    if (!bits[i] || (thickness && !isEdge(i % width, Math.floor(i / width)))) continue;
    pixels.set([red, green, blue, alpha], 4 * i);
  }
}

const shownPredictions = (image) => {
  const said = reviews.get(image.id)?.predictions ?? {};
  return image.predictions.map((one, index) => ({...one, index}))
    .filter((one) => one.score >= thresholdOf(image) || one.index in said);
};

function drawMasks(canvas, image, width, show) {
  canvas.width = width;
  canvas.height = Math.max(1, Math.round(image.height * width / image.width));
  if (!show.mask) return;
  const context = canvas.getContext('2d');
  const picture = context.createImageData(canvas.width, canvas.height);
  const masks = (list) => list.filter((one) => one.segmentation);
  if (show.prediction) {
    for (const one of masks(shownPredictions(image)).reverse()) {  // the surest on top
      paint(picture.data, rasterOf(one.segmentation, width), data.colours[one.class], 120);
    }
  }
  if (show.truth) {
    const thickness = Math.max(1, Math.round(width / 320));
    for (const one of masks(image.truth)) {  // a white edge and one of colour: seen on any ground
      const raster = rasterOf(one.segmentation, width);
      if (!show.small) paint(picture.data, raster, '#ffffff', 255, 2 * thickness);
      paint(picture.data, raster, data.colours[one.class], 255, thickness);
    }
  }
  context.putImageData(picture, 0, 0);
}

function boxShapes([x, y, width, height], className, colour) {
  const place = {x, y, width, height};
  return [shape('rect', {...place, class: `under ${className}`}), shape('rect', {...place, class: className, style: `stroke: ${colour}`})];
}

function drawBoxes(svg, image, show, current = null, unit = 0) {
  svg.setAttribute('viewBox', `0 0 ${image.width} ${image.height}`);
  svg.setAttribute('preserveAspectRatio', 'none');
  const drawn = [];
  const said = reviews.get(image.id) ?? {predictions: {}, missed: []};
  const is = (kind, index) => (current && current.kind === kind && current.index === index ? ' chosen' : '');
  const label = ([x, y], text, colour) => {
    if (!unit) return;
    const at = {x, y: Math.max(unit, y - unit * 0.35), 'font-size': unit, fill: colour, stroke: '#000', 'stroke-width': unit / 5, 'paint-order': 'stroke', 'stroke-linejoin': 'round'};
    drawn.push(shape('text', at, text));
  };
  if (show.box && show.truth) {
    image.truth.forEach((one, index) => {
      drawn.push(...boxShapes(one.bbox, `truth${is('truth', index)}`, data.colours[one.class]));
    });
  }
  if (show.box && show.prediction) {
    for (const one of shownPredictions(image).reverse()) {
      const judged = said.predictions[one.index];
      const name = `prediction${is('prediction', one.index)}${judged?.verdict === 'reject' ? ' rejected' : ''}`;
      drawn.push(...boxShapes(one.bbox, name, data.colours[one.class]));
      label(one.bbox, `${classes[one.class]} ${one.score.toFixed(2)}`, data.colours[one.class]);
    }
  }
  said.missed.forEach((one, index) => {
    const colour = data.colours[classes.indexOf(one.class)];
    drawn.push(...boxShapes(one.bbox, `missed${is('missed', index)}`, colour));
    label(one.bbox, `missed: ${one.class}`, colour);
  });
  svg.replaceChildren(...drawn);
}

// ---- Corrections --------------------------------------------------------------------------------

const KEY = `pipeline-review ${data.dataset} ${data.identity}`;
/** By image id: {note, predictions: {index: {verdict, changed}}, missed: [{bbox, class}]} */
const reviews = new Map(keptReviews());

function keptReviews() {
  try { return JSON.parse(kept.read(KEY) ?? '[]'); } catch { return []; }
}

function reviewOf(image) {
  if (!reviews.has(image.id)) reviews.set(image.id, {note: '', predictions: {}, missed: []});
  return reviews.get(image.id);
}
const isEmpty = (review) => !review.note.trim() && !review.missed.length && !Object.keys(review.predictions).length;

function corrected() {
  for (const [id, review] of reviews) if (isEmpty(review)) reviews.delete(id);
  const saved = kept.write(KEY, JSON.stringify([...reviews]));
  tell(saved ? '' : 'This browser does not keep corrections for this page: download review.json before you close it.');
  const judged = [...reviews.values()];
  const count = judged.reduce((sum, one) => sum + Object.keys(one.predictions).length + one.missed.length + (one.note.trim() ? 1 : 0), 0);
  pick('judged').textContent = count ? `${count} ${count === 1 ? 'correction' : 'corrections'} on ${judged.length} ${judged.length === 1 ? 'image' : 'images'}, kept in this browser` : 'No corrections yet: open an image to accept, reject or draw.';
  pick('download').disabled = pick('clear').disabled = !count;
}

/** What is read by `pipeline apply-review`: boxes, scores and run lengths as in predictions.json. */
function reviewFile() {
  const said = images.filter((image) => reviews.has(image.id)).map((image) => {
    const review = reviews.get(image.id);
    const judged = Object.entries(review.predictions).map(([index, {verdict, changed}]) => {
      const one = image.predictions[index];
      const entry = {bbox: one.bbox, class: classes[one.class], score: one.score};
      if (one.segmentation) entry.segmentation = one.segmentation;
      entry.verdict = verdict;
      if (changed) entry.changed_class = changed;
      return entry;
    });
    const entry = {image_id: image.id, file_name: image.name, width: image.width, height: image.height};
    if (review.note.trim()) entry.note = review.note.trim();
    return {...entry, predictions: judged, missed: review.missed};
  });
  return {format: 'pipeline-review', version: 1, dataset: data.dataset, classes, images: said};
}

/** Take over a review.json. Throws an `Error` that says what does not fit. */
function loadReview(file) {
  if (file?.format !== 'pipeline-review' || file.version !== 1) throw new Error('expected a review.json of version 1');
  if (JSON.stringify(file.classes) !== JSON.stringify(classes)) throw new Error(`expected the classes ${classes.join(', ')}, found ${file.classes?.join(', ')}`);
  const found = new Map();
  for (const said of file.images) {
    const image = images.find((one) => one.id === said.image_id && one.name === said.file_name);
    if (!image) throw new Error(`expected images of this page, found ${said.file_name}`);
    const review = {note: said.note ?? '', predictions: {}, missed: said.missed ?? []};
    for (const judged of said.predictions ?? []) {
      const index = image.predictions.findIndex((one) => one.score === judged.score && classes[one.class] === judged.class && String(one.bbox) === String(judged.bbox));
      if (index < 0) throw new Error(`${said.file_name}: expected predictions of this page, found another`);
      review.predictions[index] = {verdict: judged.verdict, ...(judged.changed_class ? {changed: judged.changed_class} : {})};
    }
    found.set(image.id, review);
  }
  reviews.clear();
  found.forEach((review, id) => reviews.set(id, review));
}

pick('download').addEventListener('click', () => {
  const text = `${JSON.stringify(reviewFile(), null, 1)}\n`;
  const address = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  element('a', {href: address, download: 'review.json'}).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
});
pick('load').addEventListener('change', async () => {
  const [file] = pick('load').files;
  if (!file) return;
  try {
    loadReview(JSON.parse(await file.text()));
    corrected();
    refreshGallery();
  } catch (error) {
    tell(`${file.name}: ${error.message}`);
  }
  pick('load').value = '';
});
pick('clear').addEventListener('click', () => {
  if (!confirm('Clear all corrections in this browser?')) return;
  reviews.clear();
  corrected();
  refreshGallery();
});

// ---- Gallery ------------------------------------------------------------------------------------

const THUMB = 256;  // pixels of a small picture's masks
const EVERYTHING = {truth: true, prediction: true, mask: true, box: true, small: true};
let shown = [];  // images that pass the filters, in their order
const cards = new Map(images.map((image) => [image, makeCard(image)]));

function makeCard(image) {
  const shot = element('span', {className: 'shot', style: {'aspect-ratio': `${image.width} / ${image.height}`}});
  const text = element('span', {className: 'text'});
  const button = element('button', {type: 'button', className: 'card', tabIndex: -1, 'aria-label': image.name}, shot, text);
  button.addEventListener('click', () => openViewer(image));
  const item = element('li', {}, button);
  if (image.moment !== null && pick('player')) {
    const seconds = Math.floor(image.moment);
    const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
    const play = element('button', {type: 'button', className: 'moment', tabIndex: -1, 'aria-label': `${image.name} in the video, at ${time}`}, `▶ ${time}`);
    play.addEventListener('click', () => showInVideo(image));
    item.append(play);
  }
  return {item, button, shot, text, image, near: false};
}

function showVerdict(target, verdict) {
  target.style.setProperty('--verdict', data.verdicts[verdict].colour);
  target.style.setProperty('--verdict-ink', data.verdicts[verdict].ink);
}

/** Fill a card that is near the screen: its picture, masks and boxes take memory. */
function fillCard(card) {
  const {image, shot, text, button} = card;
  const verdict = verdictAt(image, thresholdOf(image));
  const qualities = shownPredictions(image).map((one) => one.quality).filter((value) => value != null);
  const numbers = [];
  if (image.predictions.length) numbers.push(topScore(image).toFixed(2));
  if (qualities.length) numbers.push(`q ${Math.min(...qualities).toFixed(2)}`);
  if (isUnknown(image)) numbers.push('anomalous');
  showVerdict(button, verdict);
  text.replaceChildren(element('span', {className: 'name', title: image.name}, image.name), element('span', {className: 'badge'}, verdict), element('span', {className: 'faint'}, numbers.join('  ')));
  if (reviews.has(image.id)) text.append(element('span', {className: 'done'}, '✓ judged'));
  button.setAttribute('aria-label', `${image.name}: ${verdict}${numbers.length ? `, ${numbers.join(', ')}` : ''}${reviews.has(image.id) ? ', judged' : ''}`);
  if (!shot.firstChild) {
    shot.append(element('img', {alt: '', loading: 'lazy', decoding: 'async', src: image.picture}), element('canvas'), shape('svg', {class: 'boxes small', 'aria-hidden': 'true'}));
  }
  const [, canvas, svg] = shot.children;
  drawMasks(canvas, image, Math.min(THUMB, image.width), EVERYTHING);
  drawBoxes(svg, image, EVERYTHING);
}

const nearby = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    const card = target.card;
    card.near = isIntersecting;
    if (isIntersecting) fillCard(card);
    else card.shot.replaceChildren();
  }
}, {rootMargin: '600px 0px'});
for (const card of cards.values()) {
  card.item.card = card;
  pick('gallery').append(card.item);
  nearby.observe(card.item);
}

function passes(image) {
  const value = (id) => pick(id).value;
  const at = thresholdOf(image);
  if (value('by-class') !== '') {
    const wanted = Number(value('by-class'));
    const present = image.truth.map((one) => one.class);
    if (!(wanted < 0 ? !present.length : present.includes(wanted))) return false;
  }
  if (value('by-part') && image.part !== value('by-part')) return false;
  if (value('by-verdict') === 'unknown') {
    if (!isUnknown(image)) return false;
  } else if (value('by-verdict')) {
    const verdict = verdictAt(image, at);
    if (value('by-verdict') === 'errors' ? !ERRORS.includes(verdict) : verdict !== value('by-verdict')) return false;
  }
  const score = Math.max(0, topScore(image));
  if (value('score-from') !== '' && score < Number(value('score-from'))) return false;
  if (value('score-to') !== '' && score > Number(value('score-to'))) return false;
  if (value('quality-under') !== '' && !(lowestQuality(image) < Number(value('quality-under')))) return false;
  if (value('by-review') && reviews.has(image.id) !== (value('by-review') === 'judged')) return false;
  return true;
}

/** The lowest quality of the masks that count; infinite where there are none. */
const lowestQuality = (image) => Math.min(Infinity, ...shownPredictions(image).map((one) => one.quality ?? Infinity));

function worstFirst(a, b) {
  const key = (image) => {
    const at = thresholdOf(image);
    const verdict = verdictAt(image, at);
    const found = image.truth.filter((one) => one.score !== null && one.score >= at).length;
    return [SEVERITY[verdict], verdict === 'false alarm' ? -topScore(image) : found / Math.max(1, image.truth.length), lowestQuality(image)];
  };
  const [one, other] = [key(a), key(b)];
  const differs = one.findIndex((value, i) => value !== other[i]);
  return differs < 0 ? 0 : one[differs] - other[differs];
}
const byName = (a, b) => (a.name < b.name ? -1 : Number(a.name > b.name));
const ORDERS = {
  class: (a, b) => (isDefective(b) - isDefective(a)) || a.label - b.label,
  worst: worstFirst,
  score: (a, b) => topScore(b) - topScore(a),
  quality: (a, b) => { const [one, other] = [lowestQuality(a), lowestQuality(b)]; return one === other ? 0 : one - other; },
  file: () => 0,
};

function sortGallery() {
  const order = ORDERS[pick('order').value];
  const sorted = [...images].sort((a, b) => order(a, b) || byName(a, b));
  pick('gallery').append(...sorted.map((image) => cards.get(image).item));
  return sorted;
}
let sorted = images;

function refreshGallery() {
  shown = sorted.filter(passes);
  const visible = new Set(shown);
  for (const card of cards.values()) {
    card.item.hidden = !visible.has(card.image);
    if (card.near && !card.item.hidden) fillCard(card);
  }
  pick('count').textContent = `${shown.length} of ${images.length} images`;
  pick('nothing').hidden = shown.length > 0;
  const current = shown.find((image) => cards.get(image).button.tabIndex === 0) ?? shown[0];
  if (current) makeCurrent(current);
}

/** One card is in the order of the Tab key; arrows lead to the others. */
function makeCurrent(image) {
  for (const card of cards.values()) {
    const tabIndex = card.image === image ? 0 : -1;
    if (card.button.tabIndex === tabIndex) continue;
    card.button.tabIndex = tabIndex;
    const play = card.item.querySelector('.moment');
    if (play) play.tabIndex = tabIndex;
  }
}
pick('gallery').addEventListener('focusin', ({target}) => makeCurrent(target.closest('li').card.image));
pick('gallery').addEventListener('keydown', (event) => {
  const at = shown.indexOf(event.target.closest('li').card.image);
  const columns = getComputedStyle(pick('gallery')).gridTemplateColumns.split(' ').length;
  const steps = {ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns, ArrowDown: at + columns, Home: 0, End: shown.length - 1};
  const next = shown[steps[event.key]];
  if (!next) return;
  event.preventDefault();
  cards.get(next).button.focus();
});

pick('filters').addEventListener('submit', (event) => event.preventDefault());
pick('filters').addEventListener('input', (event) => {
  if (event.target.id === 'order') sorted = sortGallery();
  refreshGallery();
});
pick('filters').addEventListener('reset', () => setTimeout(() => { sorted = sortGallery(); refreshGallery(); }));

// ---- Video --------------------------------------------------------------------------------------

const player = pick('player');
const timed = images.filter((image) => image.moment !== null).sort((a, b) => a.moment - b.moment);

function showInVideo(image) {
  if (!player || image.moment === null) return;
  if (viewer.open) viewer.close();
  player.pause();
  player.currentTime = image.moment;
  pick('video').scrollIntoView();
  player.focus({preventScroll: true});
}
if (player) {
  for (const happening of ['timeupdate', 'seeked']) {
    player.addEventListener(happening, () => {
      const now = timed.findLast((image) => image.moment <= player.currentTime + 0.1);
      pick('open-shown').hidden = !now;
      if (!now) return;
      pick('open-shown').textContent = `Open ${now.name}`;
      pick('open-shown').onclick = () => { player.pause(); openViewer(now); };
    });
  }
}

// ---- Viewer -------------------------------------------------------------------------------------

const viewer = pick('viewer');
const stage = pick('stage');
const frame = stage.parentElement;
const show = {truth: true, prediction: true, mask: true, box: true, heat: false, zoom: false, draw: false};
let image = null;  // the one that is looked at
let current = null;  // the instance of it: {kind: 'prediction', 'truth' or 'missed', index}
let draft = null;  // a box that is being drawn, [x, y, width, height]
let missedClass = classes[0];

function openViewer(which) {
  if (!viewer.open) viewer.showModal();
  visit(which);
  frame.focus({preventScroll: true});
}
viewer.addEventListener('close', () => {
  setDrawing(false);
  refreshGallery();
  if (document.activeElement === player || cards.get(image).item.hidden) return;
  makeCurrent(image);
  cards.get(image).button.focus();
});
pick('close').addEventListener('click', () => viewer.close());

function visit(which) {
  image = which;
  draft = null;
  if (image.label >= 0) missedClass = classes[image.label];
  current = instances()[0] ?? null;
  pick('picture').src = image.picture;
  pick('picture').alt = image.name;
  stage.style.setProperty('--aspect', image.width / image.height);
  pick('viewer-name').textContent = image.name;
  if (image.heat) pick('heat').src = image.heat;
  viewer.querySelector('[data-toggle=heat]').hidden = !image.heat;
  pick('to-video').hidden = image.moment === null || !player;
  pick('panel').scrollTop = 0;
  refreshViewer();
}
function step(by) {
  const at = shown.indexOf(image);
  const next = shown[at < 0 ? 0 : at + by];
  if (next) visit(next);
}
pick('previous').addEventListener('click', () => step(-1));
pick('next').addEventListener('click', () => step(1));

/** What can be chosen in the image, in the order of the panel. */
function instances() {
  return [
    ...shownPredictions(image).map((one) => ({kind: 'prediction', index: one.index, bbox: one.bbox})),
    ...image.truth.map((one, index) => ({kind: 'truth', index, bbox: one.bbox})),
    ...(reviews.get(image.id)?.missed ?? []).map((one, index) => ({kind: 'missed', index, bbox: one.bbox})),
  ];
}
const isCurrent = (kind, index) => current?.kind === kind && current.index === index;

function refreshViewer() {
  const verdict = verdictAt(image, thresholdOf(image));
  pick('viewer-verdict').textContent = verdict;
  showVerdict(pick('viewer-verdict'), verdict);
  const at = shown.indexOf(image);
  pick('viewer-place').textContent = `${at < 0 ? '–' : at + 1} of ${shown.length} · ${image.part}${isUnknown(image) ? ' · anomalous, no known class' : ''}`;
  pick('previous').disabled = at === 0;
  pick('next').disabled = at === shown.length - 1;
  for (const button of viewer.querySelectorAll('[data-toggle]')) {
    button.setAttribute('aria-pressed', show[button.dataset.toggle]);
  }
  pick('heat').hidden = !show.heat || !image.heat;
  drawMasks(pick('masks'), image, image.width, show);
  const scale = placeStage();
  drawBoxes(pick('boxes'), image, show, current, Math.max(image.width, image.height) / 42 / scale);
  if (draft) pick('boxes').append(...boxShapes(draft, 'draft', data.colours[classes.indexOf(missedClass)]));
  fillPanel();
}

/** Show the whole image or, zoomed, what is around the chosen instance. Returns the scale. */
function placeStage() {
  const bbox = draft ?? instances().find((one) => isCurrent(one.kind, one.index))?.bbox;
  if (!show.zoom || !bbox) {
    stage.style.transform = '';
    return 1;
  }
  const [x, y, width, height] = bbox;
  const least = Math.min(image.width, image.height);
  const scale = Math.min(16, Math.max(1, least / (1.6 * Math.max(width, height, 8))));
  const shift = (center, side) => 100 * Math.min(0, Math.max(1 - scale, 0.5 - center / side * scale));
  stage.style.transform = `translate(${shift(x + width / 2, image.width)}%, ${shift(y + height / 2, image.height)}%) scale(${scale})`;
  return scale;
}

function toggle(name) {
  if (name === 'draw') setDrawing(!show.draw);
  else show[name] = !show[name];
  refreshViewer();
}
for (const button of viewer.querySelectorAll('[data-toggle]')) {
  button.addEventListener('click', () => toggle(button.dataset.toggle));
}
pick('to-video').addEventListener('click', () => showInVideo(image));

// The panel: what was found, what is true, what the reviewer says.

function choose(kind, index) {
  current = {kind, index};
  refreshViewer();
}

/** Judge a prediction; the same verdict again takes it back. */
function judge(index, verdict) {
  const said = reviewOf(image).predictions;
  if (said[index]?.verdict === verdict && !said[index].changed) delete said[index];
  else said[index] = {verdict};
  current = {kind: 'prediction', index};
  corrected();
  refreshViewer();
}
function changeClass(index, name) {
  const said = reviewOf(image).predictions;
  const own = classes[image.predictions[index].class];
  said[index] = name === own ? {verdict: 'accept'} : {verdict: 'accept', changed: name};
  current = {kind: 'prediction', index};
  corrected();
  refreshViewer();
}
function addMissed(bbox) {
  const missed = reviewOf(image).missed;
  missed.push({bbox, class: missedClass});
  current = {kind: 'missed', index: missed.length - 1};
  draft = null;
  corrected();
  refreshViewer();
}
function removeMissed(index) {
  reviewOf(image).missed.splice(index, 1);
  current = null;
  corrected();
  refreshViewer();
}

const classChoice = (value, key, label, changed) => {
  const list = element('select', {'aria-label': label, 'data-key': key}, ...classes.map((name) => element('option', {value: name, selected: name === value}, name)));
  list.addEventListener('change', () => changed(list.value));
  return list;
};
const action = (text, key, pressed, run) => {
  const button = element('button', {type: 'button', 'data-key': key}, text);
  if (pressed !== null) button.setAttribute('aria-pressed', pressed);
  button.addEventListener('click', run);
  return button;
};

function itemOf(kind, index, colour, name, numbers, actions) {
  const what = element('div', {className: 'what'}, element('b', {}, name), action('Show', `show ${kind} ${index}`, isCurrent(kind, index), () => choose(kind, index)));
  return element('li', {className: 'item', 'aria-current': isCurrent(kind, index), style: {'--class': colour}}, what, element('div', {className: 'numbers'}, numbers), ...(actions.length ? [element('div', {className: 'act'}, ...actions)] : []));
}

function fillPanel() {
  const focused = document.activeElement?.dataset?.key;
  const review = reviews.get(image.id) ?? {note: '', predictions: {}, missed: []};
  const at = thresholdOf(image);
  const predictions = shownPredictions(image).map((one) => {
    const said = review.predictions[one.index];
    const numbers = [`score ${one.score.toFixed(3)}`];
    if (one.quality != null) numbers.push(`quality ${one.quality.toFixed(2)}${data.reviewBelow !== null && one.quality < data.reviewBelow ? ' (low)' : ''}`);
    numbers.push(one.iou != null ? `true IoU ${one.iou.toFixed(2)}` : 'finds no defect of its class');
    return itemOf('prediction', one.index, data.colours[one.class], said?.changed ? `${classes[one.class]} → ${said.changed}` : classes[one.class], numbers.join(' · '), [
      action('Accept', `accept ${one.index}`, said?.verdict === 'accept', () => judge(one.index, 'accept')),
      action('Reject', `reject ${one.index}`, said?.verdict === 'reject', () => judge(one.index, 'reject')),
      classChoice(said?.changed ?? classes[one.class], `class ${one.index}`, 'Change class', (name) => changeClass(one.index, name)),
    ]);
  });
  const truths = image.truth.map((one, index) => itemOf('truth', index, data.colours[one.class], classes[one.class], one.score !== null && one.score >= at ? `found, score ${one.score.toFixed(3)}` : one.score !== null ? `not found: under the threshold, score ${one.score.toFixed(3)}` : 'not found at any score', []));
  const missed = review.missed.map((one, index) => itemOf('missed', index, data.colours[classes.indexOf(one.class)], one.class, `x ${one.bbox[0]}, y ${one.bbox[1]}, ${one.bbox[2]} × ${one.bbox[3]} pixels`, [
    classChoice(one.class, `missed class ${index}`, 'Class of the missed defect', (name) => { one.class = name; corrected(); refreshViewer(); }),
    action('Remove', `remove ${index}`, null, () => removeMissed(index)),
  ]));
  const list = (items, none) => items.length ? element('ol', {}, ...items) : element('p', {className: 'none'}, none);
  const note = element('textarea', {value: review.note, 'aria-label': 'Note', 'data-key': 'note', placeholder: 'Anything the next person should know'});
  note.addEventListener('input', () => { reviewOf(image).note = note.value; corrected(); });
  const keys = [['← →', 'previous, next image'], ['↑ ↓', 'choose an instance'], ['T P M B', 'truth, prediction, masks, boxes'], ...(image.heat ? [['H', 'heat map']] : []), ['Z', 'zoom to the chosen instance'], ['A R', 'accept, reject the chosen prediction'], ['D', 'draw a missed defect'], ['N', 'note'], ['V', 'its moment in the video'], ['Esc', 'close']];
  pick('panel').replaceChildren(
    element('h3', {}, 'Predictions'), list(predictions, `None from a score of ${decimals(at)}.`),
    element('h3', {}, 'Truth'), list(truths, 'A good image: no defect is known.'),
    element('h3', {}, 'Missed defects you mark'), list(missed, 'None. “Missed defect here” (D) draws one.'),
    element('div', {className: 'row'}, element('label', {className: 'inline'}, 'class of the next ', classChoice(missedClass, 'missed class', 'Class of the next missed defect', (name) => { missedClass = name; refreshViewer(); }))),
    element('h3', {}, 'Note'), note,
    element('h3', {}, 'Keys'), element('dl', {className: 'keys'}, ...keys.flatMap(([key, what]) => [element('dt', {}, element('kbd', {}, key)), element('dd', {}, what)])),
  );
  if (focused) pick('panel').querySelector(`[data-key="${focused}"]`)?.focus({preventScroll: true});
}

// Drawing a box, with a pointer or with keys.

function setDrawing(on) {
  show.draw = on;
  draft = null;
  viewer.classList.toggle('drawing', on);
  pick('draw-help').hidden = !on;
  if (on) frame.focus({preventScroll: true});
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));
function placeOf(event) {
  const box = pick('boxes').getBoundingClientRect();
  return [clamp((event.clientX - box.left) / box.width, 1) * image.width, clamp((event.clientY - box.top) / box.height, 1) * image.height];
}
/** The half-open box of whole pixels between two places. */
function between([x1, y1], [x2, y2]) {
  const [left, top] = [Math.floor(Math.min(x1, x2)), Math.floor(Math.min(y1, y2))];
  return [left, top, Math.ceil(Math.max(x1, x2)) - left, Math.ceil(Math.max(y1, y2)) - top];
}
let dragged = null;  // where a drag began
pick('boxes').addEventListener('pointerdown', (event) => {
  if (!show.draw || event.button) return;
  event.preventDefault();
  pick('boxes').setPointerCapture(event.pointerId);
  dragged = placeOf(event);
});
pick('boxes').addEventListener('pointermove', (event) => {
  if (!dragged) return;
  const box = between(dragged, placeOf(event));
  pick('boxes').querySelectorAll('.draft').forEach((one) => one.remove());
  pick('boxes').append(...boxShapes(box, 'draft', data.colours[classes.indexOf(missedClass)]));
});
pick('boxes').addEventListener('pointerup', (event) => {
  if (!dragged) return;
  const box = between(dragged, placeOf(event));
  dragged = null;
  if (box[2] >= 2 && box[3] >= 2) addMissed(box);
  else refreshViewer();
});
pick('boxes').addEventListener('pointercancel', () => { dragged = null; refreshViewer(); });

function drawByKey(event) {
  const unit = Math.max(1, Math.round(Math.max(image.width, image.height) / 100));
  const arrows = {ArrowLeft: [-unit, 0], ArrowRight: [unit, 0], ArrowUp: [0, -unit], ArrowDown: [0, unit]};
  if (event.key === 'Enter') {
    if (draft) { addMissed(draft); return true; }
    const [width, height] = [Math.ceil(image.width / 5), Math.ceil(image.height / 5)];
    draft = [Math.floor((image.width - width) / 2), Math.floor((image.height - height) / 2), width, height];
  } else if (event.key in arrows && draft) {
    const [dx, dy] = arrows[event.key];
    let [x, y, width, height] = draft;
    if (event.shiftKey) {
      width = Math.min(image.width - x, Math.max(2, width + dx));
      height = Math.min(image.height - y, Math.max(2, height + dy));
    } else {
      x = clamp(x + dx, image.width - width);
      y = clamp(y + dy, image.height - height);
    }
    draft = [x, y, width, height];
  } else return false;
  refreshViewer();
  return true;
}

viewer.addEventListener('keydown', (event) => {
  const typing = event.target.matches('input, textarea, select');
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Escape' && (show.draw || event.target.matches('textarea'))) {
    event.preventDefault();
    if (show.draw) toggle('draw');
    else frame.focus();
    return;
  }
  if (typing) return;
  if (show.draw && event.target === frame && drawByKey(event)) { event.preventDefault(); return; }
  const list = instances();
  const at = list.findIndex((one) => isCurrent(one.kind, one.index));
  const choices = {
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    ArrowUp: () => { const one = list[Math.max(0, at - 1)]; if (one) choose(one.kind, one.index); },
    ArrowDown: () => { const one = list[Math.min(list.length - 1, at + 1)]; if (one) choose(one.kind, one.index); },
    t: () => toggle('truth'),
    p: () => toggle('prediction'),
    m: () => toggle('mask'),
    b: () => toggle('box'),
    h: () => { if (image.heat) toggle('heat'); },
    z: () => toggle('zoom'),
    d: () => toggle('draw'),
    a: () => { if (current?.kind === 'prediction') judge(current.index, 'accept'); },
    r: () => { if (current?.kind === 'prediction') judge(current.index, 'reject'); },
    n: () => pick('panel').querySelector('textarea').focus(),
    v: () => showInVideo(image),
  };
  const run = choices[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!run) return;
  event.preventDefault();
  run();
});

corrected();
sorted = sortGallery();
setThreshold(null);
})();
