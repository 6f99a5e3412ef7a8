// A conversation, each answer shown while it is written.

let messages = [], answering = null;

/** The objects of a stream of server-sent events, as they come. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split('\n'); held = lines.pop();
    for (const line of lines) {
      if (line.startsWith('data: ') && line !== 'data: [DONE]') yield JSON.parse(line.slice(6));
    }
  }
}
function addMessage(role, text) {
  const who = { user: 'You', assistant: 'Model', system: 'Instruction' }[role];
  const shown = make('div', text, 'text'), item = within('div', make('span', who), shown);
  item.className = `said ${role}`; $('conversation').append(item);
  return shown;
}
function setAnswering(now) {
  answering = now;
  $('say').disabled = now !== null; $('stop').hidden = now === null;
  $('conversation').setAttribute('aria-busy', now !== null);  // it is read aloud once it is whole
}
async function chat(event) {
  event?.preventDefault();
  const said = $('said').value;
  if (!said.trim() || answering) return;
  const asked = [...messages, { role: 'user', content: said }], control = new AbortController();
  const mine = addMessage('user', said), shown = addMessage('assistant', '');
  $('said').value = ''; setAnswering(control); state($('chatted'), 'Answering …', 'muted');
  const body = { messages: asked, temperature: Number($('temperature').value), stream: true,
                 stream_options: { include_usage: true } };
  if ($('longest').value) body.max_tokens = Number($('longest').value);
  const started = performance.now();
  let text = '', first = null, usage = null;
  try {
    const response = await ask('/v1/chat/completions', { ...post(body), signal: control.signal });
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta.content ?? '';
      if (piece && first === null) first = performance.now() - started;
      text += piece; shown.textContent = text; usage = chunk.usage ?? usage;
    }
    messages = [...asked, { role: 'assistant', content: text }];
    const total = performance.now() - started;
    state($('chatted'), `${usage?.completion_tokens ?? '?'} tokens in ${milliseconds(total)}`
      + (first === null ? '' : `, the first after ${milliseconds(first)}`), 'muted');
  } catch (error) {
    if (error.name === 'AbortError') {
      messages = [...asked, { role: 'assistant', content: text }];
      state($('chatted'), 'Stopped.', 'muted');
    } else {  // as if it had not been said
      mine.parentNode.remove(); shown.parentNode.remove(); $('said').value = said;
      state($('chatted'), error.message, 'bad');
    }
  }
  setAnswering(null); $('said').focus(); health();
}
if (domain.chat) {
  const opening = domain.example.messages ?? [];
  $('said').value = opening.at(-1)?.content ?? '';
  const begin = () => {
    messages = opening.slice(0, -1); $('conversation').replaceChildren();
    for (const message of messages) addMessage(message.role, message.content);
  };
  begin();
  $('talk').addEventListener('submit', chat);
  $('said').addEventListener('keydown', event => { if (event.key === 'Enter' && event.ctrlKey) chat(); });
  $('stop').addEventListener('click', () => answering?.abort());
  $('fresh').addEventListener('click', () => {
    answering?.abort(); begin(); $('chatted').textContent = ''; $('said').focus();
  });
}
