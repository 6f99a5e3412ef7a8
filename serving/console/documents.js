// The documents: search, history, the difference between two versions, and a new version.

const LISTED = 200;      // more are found by searching
const COMPARED = 4e6;    // pairs of lines or words that are compared at most
let documents = [], documentsDigest = null, versionsOf = [], chosenDocument = null;

async function loadDocuments() {
  try {
    const found = await call('/v1/documents');
    documents = found.documents; documentsDigest = found.digest;
    listDocuments();
  } catch (error) { state($('listed'), error.message, 'bad'); }
}
function listDocuments() {
  const wanted = $('wanted').value.toLowerCase();
  const fit = documents.filter(each => `${each.document_id}\n${each.text}`.toLowerCase().includes(wanted));
  const more = fit.length > LISTED ? `, the first ${LISTED} are shown` : '';
  state($('listed'), `${number(fit.length)} of ${plural(documents.length, 'document')}${more}`, 'muted');
  $('document_list').replaceChildren(...fit.slice(0, LISTED).map(each => {
    const row = button(null, () => openDocument(each.document_id, true), 'row');
    row.append(make('strong', each.document_id), make('span', `version ${each.version}`, 'muted'),
               make('span', each.text, 'more'));
    row.setAttribute('aria-current', each.document_id === chosenDocument);
    return within('li', row);
  }));
}
const pathOf = id => `/v1/documents/${encodeURIComponent(id)}`;

async function openDocument(id, focus) {
  chosenDocument = id; listDocuments();
  try { versionsOf = (await call(pathOf(id))).versions; }
  catch (error) { state($('listed'), error.message, 'bad'); return; }
  const newest = versionsOf.at(-1);
  $('document').hidden = false;
  $('document_title').textContent = `${id}, version ${newest.version}`;
  $('document_text').textContent = newest.text;
  $('history').replaceChildren(...versionsOf.toReversed().map(each => within('li',
    make('strong', `Version ${each.version}`), ` recorded ${when(each.recorded_at)}`)));
  $('compare').hidden = versionsOf.length < 2;
  for (const [list, chosen] of [[$('older'), versionsOf.at(-2)], [$('newer'), newest]]) {
    list.replaceChildren(...versionsOf.map(each => new Option(each.version, each.version)));
    if (chosen) list.value = chosen.version;
  }
  compare(); editing(id, newest.text);
  if (focus) $('document_title').focus();
}
function editing(id, text) {
  $('edit_title').textContent = id ? `Change ${id}` : 'New document';
  $('edit_id').value = id; $('edit_id').readOnly = Boolean(id); $('edit_text').value = text;
  $('saved').textContent = '';
}

// --- what differs

/** [kind, part] of two lists: '=' in both, '-' in the first, '+' in the second; the least that differs. */
function difference(before, after) {
  let start = 0, end = 0;
  while (start < Math.min(before.length, after.length) && before[start] === after[start]) start++;
  while (end < Math.min(before.length, after.length) - start && before.at(-1 - end) === after.at(-1 - end)) end++;
  const a = before.slice(start, before.length - end), b = after.slice(start, after.length - end);
  const same = parts => parts.map(part => ['=', part]);
  return [...same(before.slice(0, start)), ...middle(a, b), ...same(before.slice(before.length - end))];
}
function middle(a, b) {
  if (a.length * b.length > COMPARED) return [...a.map(part => ['-', part]), ...b.map(part => ['+', part])];
  const width = b.length + 1, common = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const found = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { found.push(['=', a[i]]); i++; j++; }
    else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      found.push(['-', a[i++]]);
    } else found.push(['+', b[j++]]);
  }
  return found;
}
/** Lines first, then the words of lines that differ: long texts stay quick, short ones readable. */
function differenceOfTexts(before, after) {
  const linesOf = text => text.match(/[^\n]*\n|[^\n]+$/g) ?? [], wordsOf = text => text.match(/\s+|[^\s]+/g) ?? [];
  const found = [];
  let gone = '', come = '';
  const flush = () => { found.push(...difference(wordsOf(gone), wordsOf(come))); gone = come = ''; };
  for (const [kind, line] of difference(linesOf(before), linesOf(after))) {
    if (kind === '-') gone += line; else if (kind === '+') come += line; else { flush(); found.push([kind, line]); }
  }
  flush();
  return found;
}
function compare() {
  const textOf = list => versionsOf.find(each => String(each.version) === list.value)?.text ?? '';
  const found = differenceOfTexts(textOf($('older')), textOf($('newer'))), shown = [];
  for (const [kind, part] of found) {
    if (shown.at(-1)?.kind === kind) shown.at(-1).node.textContent += part;
    else shown.push({ kind, node: make({ '=': 'span', '-': 'del', '+': 'ins' }[kind], part) });
  }
  const count = kind => found.filter(([each, part]) => each === kind && part.trim()).length;
  const [less, more] = [count('-'), count('+')];
  const said = less + more ? `${plural(less, 'word')} removed, ${number(more)} added` : 'No difference.';
  state($('compared'), said, 'muted');
  $('diff').replaceChildren(...shown.map(each => each.node));
}

async function save(event) {
  event.preventDefault();
  const id = $('edit_id').value;
  try {
    const put = { method: 'PUT', body: JSON.stringify({ text: $('edit_text').value }) };
    const saved = await call(pathOf(id), put);
    await loadDocuments(); await openDocument(saved.document_id, false);
    state($('saved'), `${saved.document_id} is now at version ${saved.version}`, 'good');
  } catch (error) { state($('saved'), error.message, 'bad'); }
  health();
}
if (domain.documents) {
  opened.documents = () => { if (documentsDigest === null) loadDocuments(); };
  $('wanted').addEventListener('input', listDocuments);
  $('older').addEventListener('change', compare); $('newer').addEventListener('change', compare);
  $('new_document').addEventListener('click', () => {
    chosenDocument = null; listDocuments(); $('document').hidden = true; editing('', ''); $('edit_id').focus();
  });
  $('edit').addEventListener('submit', save);
}
