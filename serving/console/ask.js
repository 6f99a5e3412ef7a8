// A request of the domain's own form, and its decision.

let readRequest;

function fillForm(values) {
  const [nodes, read] = fields(resolved(domain.request), values);
  readRequest = read; $('fields').replaceChildren(...nodes);
}
async function decide(event) {
  event.preventDefault();
  $('decide').disabled = true; state($('decided'), 'Asking …', 'muted');
  try {
    const answer = await call('/v1/decisions', post(readRequest()));
    const failed = answer.escalated ? `, ${plural(answer.reasons.length, 'check')} failed` : '';
    state($('decided'), `Answered in ${milliseconds(answer.timings.total_ms)}${failed}`, 'muted');
    const raw = within('details', make('summary', 'As JSON'), make('pre', JSON.stringify(answer, null, 2)));
    const trace = button('Show its trace', () => openTrace(answer.trace_id));
    $('answer').replaceChildren(...shownAnswer(answer), raw, trace);
  } catch (error) {
    state($('decided'), error.message, 'bad'); $('answer').replaceChildren();
  }
  $('decide').disabled = false; health();
}
if (domain.request) {
  fillForm(domain.example);
  $('example').hidden = Object.keys(domain.example).length === 0;
  $('example').addEventListener('click', () => fillForm(domain.example));
  $('case').addEventListener('submit', decide);
}
