// The registry: which version answers, what the gates said, and the moves of the champion.

const MOVES = { promote: 'Promoted to', rollback: 'Rolled back to', adopt: 'Moved outside of the registry to' };
const FOLLOWED_S = 30;  // so long a promoted version may take until it answers
let registry = null, chosenVersion = null, moving = false;

const champion = () => registry?.versions.find(each => each.aliases.includes('champion'));
const previous = () => registry?.versions.find(each => each.aliases.includes('previous'));

async function loadVersions() {
  try { registry = await call('/v1/versions'); }
  catch (error) { state($('in_service'), error.message, 'bad'); return; }
  const first = champion(), is = first ? `The champion is version ${first.version}.` : 'There is no champion now.';
  const said = registry.served_is_champion ? 'It is the champion.' : is;
  state($('in_service'), `Version ${registry.served} answers. ${said}`, registry.served_is_champion ? 'good' : 'wait');
  $('checkpoints_too').hidden = registry.versions.every(each => each.servable);
  listVersions(); showMoves();
}
function listVersions() {
  const listed = registry.versions.filter(each => each.servable || $('checkpoints').checked);
  $('version_list').replaceChildren(...listed.map(each => {
    const row = button(null, () => openVersion(each.version, true), 'row');
    row.append(make('strong', `Version ${each.version}`));
    if (each.version === registry.served) row.append(make('span', 'answers', 'badge good'));
    row.append(...each.aliases.map(alias => make('span', alias, 'badge')));
    const gate = each.gate ? `gate ${each.gate}` : 'no gate yet';
    const facts = [each.stage, ...(each.servable ? [gate] : []), each.digest.slice(0, SHORT)];
    row.append(make('span', facts.join(', '), 'more'));
    row.setAttribute('aria-current', each.version === chosenVersion);
    return within('li', row);
  }));
  const back = previous();
  $('roll_back').hidden = !back || !mayAdministrate();
  if (back) $('roll_back').textContent = `Roll back to version ${back.version}`;
}
function shownGate(gate) {
  if (!gate) return [make('p', 'No gate has judged this version.')];
  const head = within('p', make('strong', gate.decision, gate.decision === 'SHIP' ? 'good' : 'bad'),
                      ` on ${when(gate.when)}, report ${gate.digest.slice(0, SHORT)}`);
  if (gate.problem) return [head, make('p', gate.problem, 'bad')];
  const why = Object.fromEntries(gate.reasons.map(each => [each.rule, `${each.reason}; look at: ${each.owner}`]));
  return [head, list('Rules', gate.rules.map(rule => {
    const measured = rule.measured === null ? [] : [precise(rule.measured)];
    const value = [...measured, `must be ${rule.bound} ${precise(rule.limit)}`].join(', ');
    const more = [make('div', value), ...(why[rule.rule] ? [make('div', why[rule.rule], 'bad')] : []),
                  ...(rule.detail ? [make('small', rule.detail)] : [])];
    return judged({ pass: 'pass', block: 'fail' }[rule.outcome] ?? rule.outcome, rule.rule, ...more);
  }))];
}
async function openVersion(version, focus) {
  chosenVersion = version; listVersions();
  let found;
  try { found = await call(`/v1/versions/${version}`); }
  catch (error) { state($('version_detail'), error.message, 'bad'); return; }
  $('version_title').textContent = `Version ${version}`;
  const from = found.origins.map(each => [each.kind, `${each.name} ${each.digest.slice(0, SHORT)}`]);
  $('version_detail').className = '';
  $('version_detail').replaceChildren(make('h3', 'Gate report'), ...shownGate(found.gate_report),
    make('h3', 'Made from'), pairs(from));
  offerPromotion(found);
  if (focus) $('version_title').focus();
}
function offerPromotion(found) {
  const possible = found.servable && found.gate === 'SHIP' && !found.aliases.includes('champion');
  $('promote').hidden = !possible || !mayAdministrate();
  $('promote').textContent = `Promote version ${found.version}`;
  $('promote').onclick = () => move(`Promote version ${found.version}?`,
    `It becomes the champion of ${registry.model} and answers every request. Its gate says SHIP. `
    + `Version ${registry.served} answers now, and stays the way back.`,
    'Promote', `/v1/versions/${found.version}/promote`);
}
async function move(title, explanation, yes, path) {
  if (moving || !await confirmed(title, explanation, yes)) return;
  moving = true; $('promote').disabled = $('roll_back').disabled = true;
  state($('moved'), 'Moving the champion: this takes some seconds …', 'muted');
  try {
    const done = await call(path, { method: 'POST' });
    const tested = done.smoke_test ? ` Its smoke test answered ${done.smoke_test}` : '';
    const moved = `Version ${done.to_version} is the champion, by ${done.who}.${tested}`;
    state($('moved'), moved, 'good');
    await follow(done.to_version);
  } catch (error) { state($('moved'), error.message, 'bad'); await loadVersions(); }
  moving = false; $('promote').disabled = $('roll_back').disabled = false;
  if (chosenVersion !== null) openVersion(chosenVersion, false);
  health();
}
/** The server follows the registry within seconds: wait until the version answers, or say that it does not yet. */
async function follow(version) {
  for (let waited = 0; waited < FOLLOWED_S; waited++) {
    await loadVersions();
    if (registry.served === version) return;
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
}
async function showMoves() {
  if (!mayAdministrate()) { $('moves').replaceChildren(); return; }
  try {
    const { moves } = await call('/v1/moves');
    $('moves').replaceChildren(...moves.map(each => {
      const to = each.to_version === null ? 'no champion' : `version ${each.to_version}`;
      const from = each.from_version === null ? '' : ` from version ${each.from_version}`;
      return within('li', make('strong', `${MOVES[each.action]} ${to}`), `${from}, by ${each.who}, ${when(each.when)}`);
    }));
  } catch (error) { $('moves').replaceChildren(make('li', error.message, 'bad')); }
}
if (domain.versions) {
  opened.versions = loadVersions;
  administratorParts.push(() => { if (registry) { loadVersions(); if (chosenVersion) openVersion(chosenVersion); } });
  $('checkpoints').addEventListener('change', listVersions);
  $('roll_back').addEventListener('click', () => move(`Roll back to version ${previous().version}?`,
    `It is loaded and must answer the domain's example; then it replaces version ${champion()?.version}, which can `
    + 'return only on a new gate report.', 'Roll back', '/v1/rollback'));
}
