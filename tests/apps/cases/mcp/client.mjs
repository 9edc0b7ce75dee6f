import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';

const said = [];
const client = new Client({ name: 'trier', version: '1.0.0' });
const [, , url, origin] = process.argv;
const transport = new StreamableHTTPClientTransport(new URL(url), origin && { requestInit: { headers: { Origin: origin } } });
await client.connect(transport);
said.push((await client.listTools()).tools.map((tool) => tool.name).join(' '));
const progress = [];
const result = await client.callTool({ name: 'add', arguments: { a: 2, b: 3 } }, undefined, {
  onprogress: (step) => progress.push(`${step.progress}/${step.total}`),
});
said.push(progress.join(' '), result.content[0].text);
await transport.terminateSession();
await client.close();
said.push('ended');
console.log(said.join('; '));
process.exit(0);
