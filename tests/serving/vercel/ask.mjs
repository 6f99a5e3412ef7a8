// Asks a server through Vercel's AI SDK: chat, a stream, a tool and an object; chat and a stream also by the provider
// that is OpenAI's own. The argument: the server's /v1.
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, jsonSchema, Output, streamText, tool } from 'ai';

const provider = createOpenAICompatible({
  name: 'twinloop', baseURL: process.argv[2], apiKey: 'none', supportsStructuredOutputs: true, includeUsage: true,
});
const openai = createOpenAI({ baseURL: process.argv[2], apiKey: 'none' });
const schema = jsonSchema({
  type: 'object', additionalProperties: false, required: ['days', 'damaged'],
  properties: { days: { type: 'integer', minimum: 0, maximum: 400 }, damaged: { type: 'boolean' } },
});
const settings = { model: provider('returns'), prompt: 'hello', seed: 3, temperature: 1, maxRetries: 0, maxOutputTokens: 400 };
const ofOpenAI = { ...settings, model: openai.chat('returns') };
const tools = { find: tool({ description: 'finds an order', inputSchema: schema, execute: async () => ({ state: 'sent' }) }) };
const result = {};

const whole = async (asked) => {
  const { text, usage } = await generateText(asked);
  return { text, tokens: usage.outputTokens };
};
const streamed = async (asked) => {
  const stream = streamText({ ...asked, onError: ({ error }) => { throw error; } });
  let text = '';
  for await (const piece of stream.textStream) text += piece;
  return { text, tokens: (await stream.usage).outputTokens };
};
result.whole = await whole(settings);
result.stream = await streamed(settings);
result.openaiWhole = await whole(ofOpenAI);
result.openaiStream = await streamed(ofOpenAI);
result.responses = await generateText({ ...settings, model: openai('returns') })
  .catch(({ statusCode, message }) => ({ status: statusCode, message }));

const called = await generateText({ ...settings, tools, toolChoice: 'required' });
result.called = called.toolCalls.map(({ toolName, input }) => ({ toolName, input }));
const went = await generateText({ ...settings, prompt: undefined,
  messages: [{ role: 'user', content: 'hello' }, ...called.response.messages] });
result.afterTool = went.usage.inputTokens;

const calledStream = streamText({ ...settings, tools, toolChoice: 'required' });
await calledStream.consumeStream();
result.calledStream = (await calledStream.toolCalls).map(({ toolName, input }) => ({ toolName, input }));

result.object = (await generateText({ ...settings, output: Output.object({ schema }) })).output;
console.log(JSON.stringify(result));
