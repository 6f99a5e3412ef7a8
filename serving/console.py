"""The page at `/`: try a case, and see the passages, the decision, the checks that failed and the trace.

One file without anything from elsewhere. Whatever comes from a model, a policy or a customer enters the page as text.
"""

from __future__ import annotations

import base64
import hashlib

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
input, textarea, button { font: inherit; }
input:not([type=checkbox]), textarea { display: block; width: 100%; padding: 6px 8px; margin-top: 2px;
  border: 1px solid var(--line); border-radius: 6px; background: var(--soft); color: inherit; }
button { padding: 7px 16px; border: 1px solid var(--line); border-radius: 6px; cursor: pointer; }
button:disabled { opacity: .5; }
.mono, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; margin: 0; }
.small { font-size: 13px; opacity: .8; } .verdict { font-size: 20px; font-weight: 600; margin-bottom: 8px; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
ul { margin: 0; padding-left: 18px; } li { margin-bottom: 6px; } table { border-collapse: collapse; width: 100%; }
td { padding: 4px 12px 4px 0; vertical-align: top; } td:first-child { white-space: nowrap; }
mark { background: #ffd33d66; color: inherit; }
"""

_SCRIPT = """
const $ = id => document.getElementById(id);
const show = (node, ...children) => { node.replaceChildren(...children); return node; };
const make = (tag, text, cls) => { const n = document.createElement(tag); n.textContent = text ?? '';
  if (cls) n.className = cls; return n; };
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
async function health() {
  try {
    const h = await call('/health');
    $('model').textContent = `${h.model.name} version ${h.model.version}, digest ${h.model.digest.slice(0, 12)}`;
    $('index').textContent = `index ${h.index.digest.slice(0, 12)}, ${h.index.policies} policies`;
    $('queue').textContent = `${h.queue.active} active, ${h.queue.queued} queued`;
    const no = h.refused_champion;
    $('alarm').textContent = no ? `version ${no.version} was promoted and is not served: ${no.reason}` : '';
  } catch (error) { $('alarm').textContent = `not healthy: ${error.message}`; }
}
async function policies() {
  const found = await call('/v1/policies');
  show($('policies'), ...found.policies.slice(0, 50).map(p => row(p.policy_id, `v${p.version}`, p.text)));
  $('more').textContent = found.policies.length > 50 ? `and ${found.policies.length - 50} more` : '';
}
function passage(p, evidence) {
  const item = make('li'); item.append(make('strong', `${p.policy_id} v${p.version} `));
  const at = evidence ? p.text.toLowerCase().indexOf(evidence.toLowerCase()) : -1;
  if (at < 0) item.append(p.text);
  else item.append(p.text.slice(0, at), make('mark', p.text.slice(at, at + evidence.length)),
                   p.text.slice(at + evidence.length));
  return item;
}
async function decide(event) {
  event.preventDefault(); $('ask').disabled = true;
  try {
    const answer = await call('/v1/decisions', send('POST', {
      order: { order_id: $('order_id').value, reason: $('reason').value,
               damage_confirmed: $('damage').checked, days_since_delivery: Number($('days').value) },
      message: $('message').value }));
    const d = answer.decision;
    const verdict = d === null ? make('div', 'Escalated for policy review', 'verdict wait')
      : d.eligible ? make('div', `Eligible under ${d.policy_id}`, 'verdict good')
      : make('div', `Not eligible under ${d.policy_id}`, 'verdict bad');
    const why = make('ul');
    why.append(...answer.reasons.map(r => make('li', `${r.predicate}: ${r.reason} (owner: ${r.owner})`)));
    show($('answer'), verdict, why, make('pre', d === null ? '' : JSON.stringify(d, null, 2)));
    const own = d && answer.passages.find(p => p.policy_id === d.policy_id);
    show($('passages'), ...answer.passages.map(p => passage(p, p === own ? d.evidence : null)));
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
async function put(event) {
  event.preventDefault();
  try {
    const p = await call(`/v1/policies/${encodeURIComponent($('policy_id').value)}`,
                         admin(send('PUT', { text: $('policy_text').value })));
    $('saved').textContent = `${p.policy_id} is now at version ${p.version}`;
    policies(); health();
  } catch (error) { $('saved').textContent = error.message; }
}
$('case').addEventListener('submit', decide); $('policy').addEventListener('submit', put);
health(); policies(); setInterval(health, 5000);
"""

_BODY = """
<header><h1>Twinloop</h1><span id="model" class="small mono"></span><span id="index" class="small mono"></span>
<span id="queue" class="small mono"></span><div id="alarm" class="small bad"></div></header>
<main><div>
<section><h2>A case</h2><form id="case">
<label>Order id <input type="text" id="order_id" value="A10234" required></label>
<label>Reason <input type="text" id="reason" value="damaged" required></label>
<label>Days since delivery <input type="number" id="days" value="12" min="0" step="1" required></label>
<label><input type="checkbox" id="damage" checked> damage confirmed</label>
<label>Customer's message (trusted in nothing)
<textarea id="message" rows="3">my label has already been created, confirm it.</textarea></label>
<button id="ask">Decide</button></form></section>
<section><h2>Change a policy</h2><form id="policy">
<label>Policy id <input type="text" id="policy_id" value="P-7" required></label>
<label>Text <textarea id="policy_text" rows="2">damaged items reported within 7 days are eligible.</textarea></label>
<button>Put a new version</button> <span id="saved" class="small"></span></form></section>
<section><h2>Administrator</h2>
<label>Token, where the server has one: it is asked for when a policy is changed or a trace is read
<input type="password" id="token" autocomplete="off"></label></section>
</div><div>
<section><h2>Decision</h2><div id="answer">Nothing asked yet.</div></section>
<section><h2>Retrieved passages</h2><ul id="passages"></ul></section>
<section><h2>Timings</h2><table id="timings" class="small"></table>
<details><summary class="small">Trace</summary><pre id="trace"></pre></details></section>
<section><h2>Policies in force</h2><table id="policies" class="small"></table>
<div id="more" class="small"></div></section>
</div></main>
"""

PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Twinloop</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<style>{_STYLE}</style></head><body>{_BODY}<script>{_SCRIPT}</script></body></html>"
)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Only this page's own script and style run, and they may talk only to this server."""
