import { createServer } from 'node:http';
import { Server } from 'socket.io';

const PAGE = `<!doctype html>
<title>Socket.IO</title>
<p id="said"></p>
<script src="/socket.io/socket.io.js"></script>
<script>
  const say = (text) => (document.getElementById('said').textContent = text);
  const socket = io({ transports: ['websocket'] });
  socket.on('connect_error', (error) => say('error: ' + error.message));
  socket.on('connect', () => {
    const bytes = new Uint8Array(300000).map((_, at) => at % 251);
    socket.emit('echo', 'hello', bytes, (text, back) => {
      const same = new Uint8Array(back).every((byte, at) => byte === at % 251);
      say(socket.io.engine.transport.name + ': ' + text + ', ' + (same ? back.byteLength : 'other') + ' bytes');
    });
  });
</script>
`;

const server = createServer((_request, response) => response.setHeader('content-type', 'text/html').end(PAGE));
new Server(server).on('connection', (socket) => socket.on('echo', (text, bytes, answer) => answer(text, bytes)));
server.listen(Number(process.argv[2]), '127.0.0.1');
