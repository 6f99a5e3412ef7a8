// Recent answers, and the trace of one of them.

async function loadAnswers(event) {
  event?.preventDefault();
  if (!mayAdministrate()) { $('answer_list').replaceChildren(); $('trace').hidden = true; return; }
  const query = new URLSearchParams();
  if ($('outcome').value) query.set('escalated', $('outcome').value);
  if ($('failed').value) query.set('check', $('failed').value);
  if ($('text').value) query.set('text', $('text').value);
  try {
    const found = await call(`/v1/traces?${query}`);
    const among = found.complete ? `all ${number(found.searched)} that are kept`
      : `the newest ${number(found.searched)}`;
    state($('found'), `${plural(found.answers.length, 'answer')} among ${among}`, 'muted');
    $('answer_list').replaceChildren(...found.answers.map(shownRow));
  } catch (error) { state($('found'), error.message, 'bad'); $('answer_list').replaceChildren(); }
}
function shownRow(answer) {
  const row = button(null, () => openTrace(answer.trace_id), 'row');
  row.append(make('span', when(answer.time)),
             make('span', answer.escalated ? 'escalated' : 'decided', `badge ${answer.escalated ? 'wait' : 'good'}`));
  row.append(make('span', `version ${answer.model.version}`, 'muted'));
  const failed = answer.reasons.map(reason => titleOf(reason.predicate)).join(', ');
  row.append(make('span', `answer: ${answer.escalated ? `none, failed: ${failed}` : brief(answer.decision)}`, 'more'),
             make('span', `request: ${brief(answer.request)}`, 'more'));
  return within('li', row);
}
/** Show a trace, in the part of the page where they are. */
async function openTrace(id) {
  openTab('answers');
  $('trace').hidden = !mayAdministrate();
  if ($('trace').hidden) return;
  $('trace_title').textContent = `Trace ${id}`;
  try {
    const trace = await call(`/v1/traces/${id}`);
    const count = `${number(trace.prompt_tokens)} tokens read, ${number(trace.completion_tokens)} written`;
    const known = [['Time', when(trace.time)], ['Tokens', count]];
    if (trace.index_digest) known.push(['Documents', `digest ${trace.index_digest.slice(0, SHORT)}`]);
    const wrote = trace.output_text === null ? []
      : [make('h3', 'What the model wrote'), make('pre', trace.output_text)];
    $('trace_content').replaceChildren(pairs(known), make('h3', 'Request'),
      make('pre', JSON.stringify(trace.request, null, 2)), ...wrote, make('h3', 'Decision'), ...shownAnswer(trace),
      within('details', make('summary', 'As JSON'), make('pre', JSON.stringify(trace, null, 2))));
  } catch (error) { $('trace_content').replaceChildren(make('p', error.message, 'bad')); }
  $('trace_title').focus(); $('trace').scrollIntoView({ block: 'nearest' });
}
if (domain.answers) {
  opened.answers = loadAnswers;
  administratorParts.push(() => { if (!$('answers').hidden) loadAnswers(); });
  $('failed').append(...Object.entries(domain.checks).map(([name, title]) => new Option(title, name)),
                     ...domain.own_checks.map(name => new Option(name, name)));
  $('filters').addEventListener('submit', loadAnswers);
  for (const id of ['outcome', 'failed']) $(id).addEventListener('change', () => loadAnswers());
}
