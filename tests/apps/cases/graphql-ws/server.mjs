import { createReadStream } from 'node:fs';
import { createServer } from 'node:http';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { GraphQLInt, GraphQLObjectType, GraphQLSchema } from 'graphql';
import { useServer } from 'graphql-ws/use/ws';
import { WebSocketServer } from 'ws';

const PAGE = `<!doctype html>
<title>graphql-ws</title>
<p id="said"></p>
<script type="module">
  import { createClient } from '/client/client.js';
  const say = (text) => (document.getElementById('said').textContent += text);
  const client = createClient({
    url: location.origin.replace('http', 'ws') + '/graphql',
    on: { connected: (socket) => say(socket.protocol + ':') },
  });
  client.subscribe({ query: 'subscription { count }' }, {
    next: ({ data }) => say(' ' + data.count),
    error: (error) => say(' error: ' + (error.message ?? error.type)),
    complete: () => say(' complete'),
  });
</script>
`;

async function* count() {
  for (const number of [1, 2, 3]) yield { count: number };
}
const Query = new GraphQLObjectType({ name: 'Query', fields: { one: { type: GraphQLInt } } });
const Subscription = new GraphQLObjectType({
  name: 'Subscription',
  fields: { count: { type: GraphQLInt, subscribe: count } },
});

const client = path.dirname(fileURLToPath(import.meta.resolve('graphql-ws')));
const server = createServer((request, response) => {
  if (!request.url.startsWith('/client/')) {
    response.setHeader('content-type', 'text/html').end(PAGE);
    return;
  }
  response.setHeader('content-type', 'text/javascript');
  const file = createReadStream(path.join(client, path.basename(request.url)));
  file.on('error', () => response.writeHead(404).end()).pipe(response);
});
const sockets = new WebSocketServer({ server, path: '/graphql' });
useServer({ schema: new GraphQLSchema({ query: Query, subscription: Subscription }) }, sockets);
server.listen(Number(process.argv[2]), '127.0.0.1');
