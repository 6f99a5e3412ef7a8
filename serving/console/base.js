'use strict';
// What every part of the page uses: nodes, the server, tabs, the administrator's token and questions before a move.

const $ = id => document.getElementById(id);
const domain = JSON.parse($('data').textContent);
const SHORT = 12;  // characters of a digest that a person reads

function make(tag, text, cls) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (cls) node.className = cls;
  return node;
}
function within(tag, ...children) { const node = make(tag); node.append(...children); return node; }
function button(text, act, cls) {
  const node = make('button', text, cls); node.type = 'button'; node.addEventListener('click', act); return node;
}
function state(node, text, cls = '') { node.textContent = text; node.className = cls; }
/** Any value in one line, without the signs of JSON. */
function brief(value) {
  if (value === null || typeof value !== 'object') return String(value);
  if (Array.isArray(value)) return value.map(brief).join(', ');
  return Object.entries(value).map(([name, inner]) =>
    inner !== null && typeof inner === 'object' ? brief(inner) : `${name}: ${inner}`).join(', ');
}
const words = value => typeof value === 'string' ? value : JSON.stringify(value);
const when = time => new Date(time).toLocaleString();
const number = (value, digits = 0) => value.toLocaleString('en', { maximumFractionDigits: digits });
const plural = (count, one) => `${number(count)} ${one}${count === 1 ? '' : 's'}`;
const precise = value => String(Number(value.toPrecision(6)));
const milliseconds = value => `${number(value, value < 10 ? 1 : 0)} ms`;

/** A list of names and what they are. */
function pairs(entries) {
  const list = make('dl');
  for (const [name, value] of entries) {
    list.append(make('dt', name), typeof value === 'string' ? make('dd', value) : within('dd', value));
  }
  return list;
}
/** A line of a list of things that passed or did not. kind: pass, fail, or another word, which is shown. */
function judged(kind, title, ...more) {
  const known = { pass: ['✓', 'passed', 'good'], fail: ['✗', 'failed', 'bad'] };
  const [sign, said, cls] = known[kind] ?? ['–', kind, 'muted'];
  const mark = make('span', sign, cls); mark.setAttribute('aria-hidden', 'true');
  const line = within('div', mark, within('div', make('strong', title), ' ', make('span', said, cls), ...more));
  line.className = 'signed';
  return within('li', line);
}
function list(label, items) {
  const node = make('ul', null, 'list'); node.setAttribute('aria-label', label); node.append(...items);
  return node;
}

// --- the server

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (options.body) headers['Content-Type'] = 'application/json';
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try { response = await fetch(path, { ...options, headers }); }
  catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('the server does not answer');
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) useToken('');
  throw new Refused(response.status, body.error?.message ?? body.reason ?? `the server answers ${response.status}`);
}
const call = async (path, options) => (await ask(path, options)).json();
const post = body => ({ method: 'POST', body: JSON.stringify(body) });

// --- the administrator's token: kept here, and nowhere else

let token = '';
const mayAdministrate = () => domain.access === 'here' || (domain.access === 'token' && token !== '');
const administratorParts = [];  // called when it changes what an administrator may see

function useToken(given) {
  if (given === token) return;
  token = given;
  showAdministrator();
  for (const part of administratorParts) part();
}
function showAdministrator() {
  const open = mayAdministrate();
  $('administrator').hidden = domain.access !== 'token';
  $('administrator').textContent = open ? 'Forget the administrator’s token' : 'Enter the administrator’s token';
  for (const place of document.querySelectorAll('[data-admin]')) {
    place.replaceChildren(); place.className = open ? '' : 'needs';
    if (open) continue;
    if (domain.access === 'token') {
      place.append(make('p', `The administrator’s token is needed ${place.dataset.admin}.`),
                   button('Enter the token', askForToken));
    } else {
      place.append(`Nobody can be an administrator here, which is needed ${place.dataset.admin}: `
                   + 'start the server with TWINLOOP_ADMIN_TOKEN.');
    }
  }
}
function askForToken() { $('token').value = ''; $('token_wrong').textContent = ''; $('token_dialog').showModal(); }
$('administrator').addEventListener('click', () => token ? useToken('') : askForToken());
$('token_cancel').addEventListener('click', () => $('token_dialog').close());
$('token_form').addEventListener('submit', async event => {
  event.preventDefault();
  const given = $('token').value, headers = { Authorization: `Bearer ${given}` };
  try {
    if ((await fetch('/v1/traces?limit=1', { headers })).status === 401) {
      $('token_wrong').textContent = 'This is not the token of this server.';
      return;
    }
  } catch { $('token_wrong').textContent = 'It cannot be used in a header, or the server does not answer.'; return; }
  $('token_dialog').close(); useToken(given);
});

/** Whether the person at the page says yes. */
function confirmed(title, explanation, yes) {
  $('confirm_title').textContent = title; $('confirm_words').textContent = explanation;
  $('confirm_yes').textContent = yes;
  return new Promise(resolve => {
    const dialog = $('confirm'), end = answer => () => { resolve(answer); dialog.close(); };
    $('confirm_no').onclick = end(false); $('confirm_yes').onclick = end(true);
    // By Escape. The event comes a moment later, and may find the next question open.
    dialog.onclose = () => { if (!dialog.open) resolve(false); };
    dialog.showModal(); $('confirm_no').focus();
  });
}

// --- tabs: by mouse, by arrow keys, and by the address (#versions)

const opened = {};  // by tab: called whenever it is shown
const tabs = () => [...document.querySelectorAll('[role=tab]:not([hidden])')];
const shownTab = () => tabs().find(tab => tab.getAttribute('aria-selected') === 'true');

function openTab(name, focus = false) {
  const wanted = tabs().find(tab => tab.getAttribute('aria-controls') === name) ?? tabs()[0];
  for (const tab of document.querySelectorAll('[role=tab]')) {
    const chosen = tab === wanted;
    tab.setAttribute('aria-selected', chosen); tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute('aria-controls')).hidden = !chosen;
  }
  const id = wanted.getAttribute('aria-controls');
  if (focus) wanted.focus();
  if (location.hash.slice(1) !== id) history.replaceState(null, '', `#${id}`);
  opened[id]?.();
}
$('tabs').addEventListener('click', event => {
  const tab = event.target.closest('[role=tab]');
  if (tab) openTab(tab.getAttribute('aria-controls'));
});
$('tabs').addEventListener('keydown', event => {
  const all = tabs(), at = all.indexOf(shownTab());
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  openTab(all[(next + all.length) % all.length].getAttribute('aria-controls'), true);
});
