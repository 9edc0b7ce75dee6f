import { randomUUID } from 'node:crypto';
import { createMcpExpressApp } from '@modelcontextprotocol/sdk/server/express.js';
import { McpServer } from '@modelcontextprotocol/sdk/server/mcp.js';
import { StreamableHTTPServerTransport } from '@modelcontextprotocol/sdk/server/streamableHttp.js';
import { z } from 'zod';

const [port, ...allowedHosts] = process.argv.slice(2);
const app = createMcpExpressApp(allowedHosts.length ? { allowedHosts } : {});
const origin = process.env.ALLOWED_ORIGIN;
const sessions = new Map();

function server() {
  const one = new McpServer({ name: 'adder', version: '1.0.0' });
  one.registerTool('add', { inputSchema: { a: z.number(), b: z.number() } }, async ({ a, b }, extra) => {
    const progressToken = extra._meta?.progressToken;
    for (const progress of [1, 2]) {
      await extra.sendNotification({ method: 'notifications/progress', params: { progressToken, progress, total: 2 } });
    }
    return { content: [{ type: 'text', text: String(a + b) }] };
  });
  return one;
}

app.all('/mcp', async (request, response) => {
  let transport = sessions.get(request.headers['mcp-session-id']);
  if (!transport) {
    transport = new StreamableHTTPServerTransport({
      sessionIdGenerator: randomUUID,
      ...(origin && { enableDnsRebindingProtection: true, allowedOrigins: [origin] }),
      onsessioninitialized: (id) => sessions.set(id, transport),
    });
    await server().connect(transport);
  }
  await transport.handleRequest(request, response, request.body);
});
app.listen(Number(port), '127.0.0.1');
