// The load as small charts, read while this part is shown and the page is visible.

const READ_EVERY_MS = 2000, POINTS = 150, FEWEST = 30;  // five minutes, and one to begin with
const readings = [];
const share = (part, whole) => whole > 0 ? part / whole : null;
const CHARTS = [
  { title: 'Requests', unit: 'a second', digits: 1,
    value: (now, before) => share(now.requests - before.requests, now.clock_s - before.clock_s),
    more: now => `${number(now.requests)} since the start, ${number(now.refused)} refused` },
  { title: 'Time to first token', unit: 'ms, mean', digits: 0,
    value: (now, before) => share(1000 * (now.first_token_s - before.first_token_s),
                                  now.first_tokens - before.first_tokens),
    more: now => `${number(now.first_tokens)} answers since the start` },
  { title: 'Written tokens', unit: 'a second', digits: 0, value: now => now.tokens_per_s,
    more: now => `${number(now.completion_tokens)} written, ${number(now.prompt_tokens)} read since the start` },
  { title: 'Queue', unit: 'waiting', digits: 0, value: now => now.queued,
    more: now => `${now.active} of ${now.slots} slots in use, ${now.capacity} requests fit` },
];

function svg(tag, attributes) {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
const widthOf = values => Math.max(values.length, FEWEST);

/** A line over the last readings; where nothing was measured there is a gap. */
function drawn(values, top) {
  const width = widthOf(values), y = value => 39 - value / top * 36;
  const x = at => (width - values.length + at) / (width - 1) * 100;
  const runs = [];
  values.forEach((value, at) => {
    if (value === null) return;
    if (at && values[at - 1] !== null) runs.at(-1).push(at); else runs.push([at]);
  });
  const nodes = [svg('line', { class: 'grid', x1: 0, x2: 100, y1: y(top), y2: y(top) })];
  for (const run of runs) {
    const points = run.map(at => `${x(at).toFixed(2)},${y(values[at]).toFixed(2)}`);
    if (run.length === 1) points.push(`${(x(run[0]) + 0.4).toFixed(2)},${y(values[run[0]]).toFixed(2)}`);
    const ends = [`${x(run[0]).toFixed(2)},40`, `${x(run.at(-1)).toFixed(2)},40`];
    nodes.push(svg('polygon', { class: 'area', points: [ends[0], ...points, ends[1]].join(' ') }),
               svg('polyline', { class: 'line', points: points.join(' ') }));
  }
  return nodes;
}
/** 1, 2 or 5 times a power of ten, at least the value. */
function roundTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map(step => step * power).find(top => top >= value);
}
for (const chart of CHARTS) {
  chart.now = make('strong', '–'); chart.note = make('div', null, 'hint');
  chart.top = make('span'); chart.start = make('span');
  chart.svg = svg('svg', { viewBox: '0 0 100 40', preserveAspectRatio: 'none', role: 'img',
                           'aria-label': `${chart.title}, ${chart.unit}: not read yet` });
  chart.top.className = 'top';
  const axis = within('div', chart.start, make('span', 'now')), plot = within('div', chart.top, chart.svg, axis);
  axis.className = 'axis'; plot.className = 'plot';
  const card = within('div', make('h2', chart.title), chart.now, ` ${chart.unit}`, plot, chart.note);
  card.className = 'card chart'; $('charts').append(card);
}
function drawLoad() {
  const now = readings.at(-1);
  for (const chart of CHARTS) {
    const values = readings.slice(1).map((reading, at) => chart.value(reading, readings[at]));
    const measured = values.filter(value => value !== null), last = values.at(-1) ?? null;
    const top = roundTop(Math.max(0, ...measured)), shown = value => number(value, chart.digits);
    chart.now.textContent = last === null ? '–' : shown(last);
    chart.svg.replaceChildren(...drawn(values, top));
    chart.top.textContent = number(top, 2);
    const seconds = (widthOf(values) - 1) * READ_EVERY_MS / 1000;
    chart.start.textContent = seconds < 120 ? `${seconds} seconds ago` : `${number(seconds / 60)} minutes ago`;
    chart.note.textContent = chart.more(now);
    const high = measured.length ? `, highest ${shown(Math.max(...measured))}` : '';
    chart.svg.setAttribute('aria-label',
      `${chart.title}, ${chart.unit}: now ${chart.now.textContent}${high} in ${values.length} readings`);
  }
}
async function readLoad() {
  if (document.hidden || $('load').hidden) return;
  try {
    const now = await call('/v1/load'), missed = now.clock_s - (readings.at(-1)?.clock_s ?? now.clock_s);
    if (missed * 1000 > 3 * READ_EVERY_MS) readings.length = 0;  // the page was hidden: a line would hide the gap
    readings.push(now);
    if (readings.length > POINTS + 1) readings.shift();
    state($('load_state'), readings.length < 2 ? 'Measuring: rates need two readings.' : '', 'muted');
    drawLoad();
  } catch (error) { state($('load_state'), error.message, 'bad'); }
}
opened.load = () => { readings.length = 0; readLoad(); };
setInterval(readLoad, READ_EVERY_MS);
