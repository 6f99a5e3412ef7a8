// One answer, as it came or as its trace has it: decision, checks, passages, times.

function shownDecision(decision) {
  if (decision === null) return make('div', 'Escalated for review', 'verdict wait');
  if (typeof decision !== 'object') return make('div', words(decision), 'verdict good');
  const shown = pairs(Object.entries(decision).map(([name, value]) => [name, words(value)]));
  shown.id = 'decision';
  return shown;
}

const titleOf = check => domain.checks[check] ?? check;

/** Every check with its title, whether it passed, and the reason where it did not. */
function shownChecks(answer) {
  const reasons = Object.fromEntries(answer.reasons.map(reason => [reason.predicate, reason]));
  const names = [...new Set([...Object.keys(answer.checks ?? {}), ...Object.keys(reasons)])];
  return names.map(name => {
    const reason = reasons[name];
    if (reason) {
      return judged('fail', titleOf(name), make('div', reason.reason), make('small', `look at: ${reason.owner}`));
    }
    // Of an answer without form the other checks are false too, and nothing is said of them.
    return judged(answer.checks[name] ? 'pass' : 'not judged', titleOf(name));
  });
}

/** Texts of the decision that a document may hold word for word. */
function quotesOf(decision) {
  const values = decision !== null && typeof decision === 'object' ? Object.values(decision) : [decision];
  return values.filter(value => typeof value === 'string' && value.length >= 12);
}
function shownPassage(passage, decision) {
  const item = make('li'), text = make('div', null, 'text'), head = make('div');
  head.append(make('strong', passage.document_id), ` version ${passage.version} `);
  const values = decision !== null && typeof decision === 'object' ? Object.values(decision) : [];
  if (values.includes(passage.document_id)) head.append(make('span', 'cited', 'badge good'));
  const quote = quotesOf(decision).find(one => passage.text.toLowerCase().includes(one.toLowerCase()));
  const at = quote ? passage.text.toLowerCase().indexOf(quote.toLowerCase()) : -1;
  if (at < 0) text.append(passage.text);
  else text.append(passage.text.slice(0, at), make('mark', passage.text.slice(at, at + quote.length)),
                   passage.text.slice(at + quote.length));
  item.append(head, text);
  return item;
}

function shownTimes(answer) {
  const times = answer.timings, model = answer.model;
  const rows = [['Answered by', `${model.name} version ${model.version}, digest ${model.digest.slice(0, SHORT)}`]];
  if (domain.documents) rows.push(['Retrieval', milliseconds(times.retrieval_ms)]);
  if (times.queue_ms !== null) rows.push(['Queue', milliseconds(times.queue_ms)]);
  rows.push(['First token', times.ttft_ms === null ? 'the model was not asked' : milliseconds(times.ttft_ms)],
            ['Whole answer', milliseconds(times.total_ms)]);
  return pairs(rows);
}

/** The nodes of an answer, each part with its heading. */
function shownAnswer(answer) {
  const parts = [shownDecision(answer.decision)], checks = shownChecks(answer);
  if (checks.length) parts.push(make('h3', 'Checks'), list('Checks', checks));
  if (answer.passages.length) {
    const passages = list('Retrieved documents', answer.passages.map(each => shownPassage(each, answer.decision)));
    passages.id = 'passages';
    parts.push(make('h3', 'Retrieved documents'), passages);
  }
  parts.push(make('h3', 'Times'), shownTimes(answer));
  return parts;
}
