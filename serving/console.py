"""The page at `/`: try a case, and see the passages, the decision, the checks that failed and the trace.

One file without anything from elsewhere. Its form is made from the JSON schema of the domain's request. Whatever comes
from a model, a document or a customer enters the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape

from twinloop.domains.domain import Domain

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a7f37; --bad: #b42318; --wait: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff8177; --wait: #d9a62e; } }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1080px; padding: 24px; }
header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; margin-bottom: 20px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 15px; margin: 0 0 10px; }
main { display: grid; grid-template-columns: minmax(280px, 5fr) 7fr; gap: 20px; align-items: start; }
@media (max-width: 760px) { main { grid-template-columns: 1fr; } }
section { border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin-bottom: 20px; }
label { display: block; margin-bottom: 10px; font-size: 13px; }
input, textarea, select, button { font: inherit; }
input:not([type=checkbox]), textarea, select { display: block; width: 100%; padding: 6px 8px; margin-top: 2px;
  border: 1px solid var(--line); border-radius: 6px; background: var(--soft); color: inherit; }
fieldset { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 10px; padding: 8px 12px 2px; }
legend, .hint { font-size: 13px; opacity: .8; } .hint { display: block; font-size: 12px; }
button { padding: 7px 16px; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
button:disabled { opacity: .5; }
.mono, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; margin: 0; }
.small { font-size: 13px; opacity: .8; } .verdict { font-size: 20px; font-weight: 600; margin-bottom: 8px; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
ul { margin: 0; padding-left: 18px; } li { margin-bottom: 6px; } table { border-collapse: collapse; width: 100%; }
td { padding: 4px 12px 4px 0; vertical-align: top; } td:first-child { white-space: nowrap; }
mark { background: #ffd33d66; color: inherit; }
"""

_SCRIPT = r"""
const $ = id => document.getElementById(id);
const domain = JSON.parse($('domain').textContent);
const show = (node, ...children) => { node.replaceChildren(...children); return node; };
const make = (tag, text, cls) => { const n = document.createElement(tag); n.textContent = text ?? '';
  if (cls) n.className = cls; return n; };
const words = value => typeof value === 'string' ? value : JSON.stringify(value);
async function call(path, options) {
  const response = await fetch(path, options);
  const body = await response.json();
  if (!response.ok) throw new Error(body.error ? body.error.message : body.reason || response.statusText);
  return body;
}
const send = (method, body) => ({ method, headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body) });
const admin = options => $('token').value
  ? { ...options, headers: { ...options.headers, Authorization: `Bearer ${$('token').value}` } } : options;
function row(...cells) { const r = make('tr'); r.append(...cells.map(c => make('td', c))); return r; }

// --- a form from a JSON schema: each field is a node, and a function that reads its value (undefined: left out)

function resolved(schema) {
  const branches = schema.anyOf ?? schema.oneOf ?? [];
  const some = branches.filter(branch => branch.type !== 'null');
  if (some.length === 1) schema = { ...some[0], ...schema, nullable: some.length < branches.length };
  if (schema.allOf?.length === 1) schema = { ...schema.allOf[0], ...schema };
  if (schema.$ref) {
    const { $ref, ...rest } = schema;
    schema = { ...resolved(domain.request.$defs[$ref.split('/').pop()]), ...rest };
  }
  return schema;
}
function control(schema, value, needed) {
  if (schema.enum) {
    const list = make('select');
    if (!needed) list.append(new Option('', ''));
    list.append(...schema.enum.map(one => new Option(words(one), JSON.stringify(one))));
    if (value !== undefined) list.value = JSON.stringify(value);
    return [list, () => JSON.parse(list.value)];
  }
  if (schema.type === 'boolean') {
    const box = make('input'); box.type = 'checkbox'; box.checked = value === true;
    return [box, () => box.checked];
  }
  if (schema.type === 'integer' || schema.type === 'number') {
    const box = make('input'); box.type = 'number'; box.step = schema.type === 'integer' ? 1 : 'any';
    if (schema.minimum !== undefined) box.min = schema.minimum;
    if (schema.maximum !== undefined) box.max = schema.maximum;
    box.value = value ?? '';
    return [box, () => Number(box.value)];
  }
  const text = schema.type === 'string', short = text && (schema.pattern || schema.format || schema.maxLength <= 60);
  const box = make(short ? 'input' : 'textarea'); if (short) box.type = 'text'; else box.rows = 3;
  box.value = value === undefined ? '' : text ? value : JSON.stringify(value);
  return [box, () => text ? box.value : JSON.parse(box.value)];
}
function field(name, schema, value, required) {
  schema = resolved(schema); value ??= schema.default ?? undefined;
  if (schema.const !== undefined) return [make('span'), () => schema.const];
  const title = name.replaceAll('_', ' '), hint = schema.description ? [make('span', schema.description, 'hint')] : [];
  if (schema.type === 'object' && schema.properties && (required || !schema.nullable)) {
    const group = make('fieldset'), [nodes, read] = fields(schema, value ?? {});
    group.append(make('legend', title), ...hint, ...nodes);
    return [group, read];
  }
  const needed = required && !schema.nullable, label = make('label'), [box, read] = control(schema, value, needed);
  const nonempty = schema.type !== 'string' || schema.minLength > 0 || Boolean(schema.pattern);
  box.name = name; box.required = needed && nonempty && box.type !== 'checkbox';
  if (box.type === 'checkbox') label.append(box, ` ${title}`, ...hint); else label.append(title, ...hint, box);
  const empty = required ? schema.nullable ? null : '' : undefined;
  return [label, () => box.type === 'checkbox' || box.value !== '' ? read() : empty];
}
function fields(schema, values) {
  const parts = Object.entries(schema.properties).map(([name, inner]) =>
    [name, ...field(name, inner, values[name], (schema.required ?? []).includes(name))]);
  const read = () => Object.fromEntries(parts.map(([name, , get]) => [name, get()]).filter(([, v]) => v !== undefined));
  return [parts.map(([, node]) => node), read];
}

// --- the server's answers

async function health() {
  try {
    const h = await call('/health');
    $('model').textContent = `${h.model.name} version ${h.model.version}, digest ${h.model.digest.slice(0, 12)}`;
    $('index').textContent = domain.documents
      ? `index ${h.index.digest.slice(0, 12)}, ${h.index.documents} documents` : '';
    $('queue').textContent = `${h.queue.active} active, ${h.queue.queued} queued`;
    const no = h.refused_champion;
    $('alarm').textContent = no ? `version ${no.version} was promoted and is not served: ${no.reason}` : '';
  } catch (error) { $('alarm').textContent = `not healthy: ${error.message}`; }
}
async function documents() {
  const found = await call('/v1/documents');
  show($('documents'), ...found.documents.slice(0, 50).map(d => row(d.document_id, `v${d.version}`, d.text)));
  $('more').textContent = found.documents.length > 50 ? `and ${found.documents.length - 50} more` : '';
}
function passage(p, quotes) {
  const item = make('li'); item.append(make('strong', `${p.document_id} v${p.version} `));
  const quote = quotes.find(q => p.text.toLowerCase().includes(q.toLowerCase()));
  const at = quote ? p.text.toLowerCase().indexOf(quote.toLowerCase()) : -1;
  if (at < 0) item.append(p.text);
  else item.append(p.text.slice(0, at), make('mark', p.text.slice(at, at + quote.length)),
                   p.text.slice(at + quote.length));
  return item;
}
function shown(decision) {
  if (decision === null) return make('div', 'Escalated for review', 'verdict wait');
  if (typeof decision !== 'object') return make('div', words(decision), 'verdict good');
  const table = make('table'); table.id = 'decision';
  table.append(...Object.entries(decision).map(([name, value]) => row(name, words(value))));
  return table;
}
async function decide(event) {
  event.preventDefault(); $('ask').disabled = true;
  try {
    const answer = await call('/v1/decisions', send('POST', request()));
    const d = answer.decision, why = make('ul');
    why.append(...answer.reasons.map(r => make('li', `${r.predicate}: ${r.reason} (owner: ${r.owner})`)));
    show($('answer'), shown(d), why);
    const quotes = Object.values(d !== null && typeof d === 'object' ? d : {})
      .filter(value => typeof value === 'string' && value.length >= 12);
    show($('passages'), ...answer.passages.map(p => passage(p, quotes)));
    const t = answer.timings, m = answer.model, ms = v => v === null ? 'none' : `${v.toFixed(1)} ms`;
    show($('timings'), row('retrieval', ms(t.retrieval_ms)), row('queue', ms(t.queue_ms)),
         row('first token', ms(t.ttft_ms)), row('total', ms(t.total_ms)),
         row('answered by', `${m.name} version ${m.version}, digest ${m.digest.slice(0, 12)}`),
         row('trace', answer.trace_id));
    try { $('trace').textContent = JSON.stringify(await call(`/v1/traces/${answer.trace_id}`, admin({})), null, 2); }
    catch (error) { $('trace').textContent = error.message; }
  } catch (error) {
    show($('answer'), make('div', error.message, 'verdict bad'));
    show($('passages')); show($('timings')); $('trace').textContent = '';
  }
  $('ask').disabled = false; health();
}
async function chat(event) {
  event.preventDefault(); $('say').disabled = true;
  try {
    const messages = [{ role: 'user', content: $('said').value }];
    const answer = await call('/v1/chat/completions', send('POST', { messages, temperature: 0 }));
    $('reply').textContent = answer.choices[0].message.content; $('reply').className = 'mono';
  } catch (error) { $('reply').textContent = error.message; $('reply').className = 'mono bad'; }
  $('say').disabled = false; health();
}
async function put(event) {
  event.preventDefault();
  try {
    const d = await call(`/v1/documents/${encodeURIComponent($('document_id').value)}`,
                         admin(send('PUT', { text: $('document_text').value })));
    $('saved').textContent = `${d.document_id} is now at version ${d.version}`;
    documents(); health();
  } catch (error) { $('saved').textContent = error.message; }
}
let request;
for (const part of document.querySelectorAll('[data-for]')) part.hidden = !domain[part.dataset.for];
if (domain.request) {
  const [nodes, read] = fields(resolved(domain.request), domain.example);
  request = read; $('fields').append(...nodes);
  $('case').addEventListener('submit', decide);
}
$('said').value = domain.example.messages?.at(-1)?.content ?? '';
$('talk').addEventListener('submit', chat);
if (domain.documents) {
  $('document_id').value = domain.documents.document_id ?? ''; $('document_text').value = domain.documents.text ?? '';
  $('document').addEventListener('submit', put); documents();
}
health(); setInterval(health, 5000);
"""

_BODY = """
<header><h1>Twinloop</h1><span class="small mono">{name}</span><span id="model" class="small mono"></span>
<span id="index" class="small mono"></span><span id="queue" class="small mono"></span>
<div id="alarm" class="small bad"></div></header>
<main><div>
<section data-for="request"><h2>A case</h2><form id="case"><div id="fields"></div>
<button id="ask">Decide</button></form></section>
<section data-for="chat"><h2>Chat</h2><form id="talk">
<label>Message <textarea id="said" rows="3" required></textarea></label><button id="say">Send</button></form></section>
<section data-for="documents"><h2>Change a document</h2><form id="document">
<label>Document id <input type="text" id="document_id" required></label>
<label>Text <textarea id="document_text" rows="3" required></textarea></label>
<button>Put a new version</button> <span id="saved" class="small"></span></form></section>
<section><h2>Administrator</h2>
<label>Token, where the server has one: it is asked for when a document is changed or a trace is read
<input type="password" id="token" autocomplete="off"></label></section>
</div><div>
<section data-for="chat"><h2>Answer</h2><div id="reply" class="mono">Nothing asked yet.</div></section>
<section data-for="request"><h2>Decision</h2><div id="answer">Nothing asked yet.</div></section>
<section data-for="documents"><h2>Retrieved passages</h2><ul id="passages"></ul></section>
<section data-for="request"><h2>Timings</h2><table id="timings" class="small"></table>
<details><summary class="small">Trace</summary><pre id="trace"></pre></details></section>
<section data-for="documents"><h2>Documents</h2><table id="documents" class="small"></table>
<div id="more" class="small"></div></section>
</div></main>
"""


def console_page(domain: Domain) -> str:
    """The page for a model of this domain."""
    first = next(iter(domain.example_documents), None)
    described = {
        "request": domain.request.model_json_schema() if domain.request else None,
        "example": dict(domain.example),
        "chat": domain.serves_chat,
        "documents": {"document_id": first.document_id, "text": first.text} if first else bool(domain.passages),
    }
    data = json.dumps(described).replace("<", "\\u003c")  # nothing in it ends the element
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Twinloop</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{_BODY.replace('{name}', escape(domain.name))}"
        f'<script type="application/json" id="domain">{data}</script><script>{_SCRIPT}</script></body></html>'
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Only this page's own script and style run, and they may talk only to this server."""
