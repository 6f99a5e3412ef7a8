// A form from a JSON schema: each field is a node, and a function that reads its value (undefined: left out).

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
/** Whether a text may stand in a field; a pattern that is none in JavaScript is left to the server. */
function fits(schema, text) {
  if (!schema.pattern) return true;
  try { return new RegExp(schema.pattern, 'u').test(text); } catch { return true; }
}
function control(schema, value, needed) {
  if (schema.enum) {
    const list = make('select');
    if (!needed || value === undefined) list.append(new Option('', ''));
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
  const text = schema.type === 'string';
  const short = text && (schema.format || schema.maxLength <= 60 || !fits(schema, 'a\nb'));
  const box = make(short ? 'input' : 'textarea');
  if (short) box.type = 'text'; else box.rows = 4;
  if (text && schema.maxLength) box.maxLength = schema.maxLength;
  if (!text) box.placeholder = schema.type === 'array' ? '["as JSON"]' : 'as JSON';
  box.value = value === undefined ? '' : text ? value : JSON.stringify(value);
  return [box, () => {
    if (text) return box.value;
    try { return JSON.parse(box.value); }
    catch { throw new Error(`${box.name.replaceAll('_', ' ')}: not JSON, such as ["a", "b"]`); }
  }];
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
  const nonempty = schema.type !== 'string' || schema.minLength > 0 || !fits(schema, '');
  box.name = name; box.required = needed && nonempty && box.type !== 'checkbox';
  if (box.type === 'checkbox') label.append(box, title, ...hint);
  else label.append(required ? title : `${title} (optional)`, ...hint, box);
  const empty = required ? schema.nullable ? null : '' : undefined;
  return [label, () => box.type === 'checkbox' || box.value !== '' ? read() : empty];
}
function fields(schema, values) {
  const parts = Object.entries(schema.properties ?? {}).map(([name, inner]) =>
    [name, ...field(name, inner, values[name], (schema.required ?? []).includes(name))]);
  const read = () => Object.fromEntries(parts.map(([name, , get]) => [name, get()]).filter(([, v]) => v !== undefined));
  return [parts.map(([, node]) => node), read];
}
