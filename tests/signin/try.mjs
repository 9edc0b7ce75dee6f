// A provider, two tunnels, a callback of their own and one for all, and a browser that goes through them.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmodSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { Provider } from 'oidc-provider';
import { chromium } from 'playwright-core';

const folder = import.meta.dirname;
const binary = (name) => path.join(process.env.BINARIES, name);
const PATIENCE = 60_000;
const running = [];

function start(program, args) {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'pipe'] });
  child.said = '';
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (child.said += text));
  running.push(child);
  return child;
}

async function until(what, question) {
  const end = Date.now() + PATIENCE;
  for (;;) {
    const answer = await question();
    if (answer) return answer;
    if (Date.now() > end) throw new Error(`never came true: ${what}`);
    await pause(50);
  }
}

const says = async (child, pattern) =>
  (await until(`${pattern}`, () => child.exitCode === null ? child.said.match(pattern) : assert.fail(child.said)))[1];

async function listening(handler) {
  const server = http.createServer(handler).listen(0, '127.0.0.1');
  await once(server, 'listening');
  return server;
}

/** Says who asks. */
const upstream = await listening((request, response) => {
  response.setHeader('content-type', 'text/html');
  const seen = { user: request.headers['x-tunnel-user'], cookie: request.headers.cookie, url: request.url };
  response.end(`<pre id="seen">${JSON.stringify(seen)}</pre>`);
});

/** The provider: everybody is who they say they are; each has an email of that name. */
function provide(issuer, redirects) {
  const provider = new Provider(issuer, {
    clients: [{ client_id: 'tunnel', client_secret: 'top secret', redirect_uris: redirects }],
    cookies: { keys: ['only for this run'] },
    claims: { openid: ['sub'], email: ['email', 'email_verified'], profile: ['groups'] },
    findAccount: (_, id) => ({
      accountId: id,
      claims: () => ({ sub: id, email: `${id}@example.com`, email_verified: true, groups: [id === 'root' ? 'ops' : 'dev'] }),
    }),
  });
  return provider.callback();
}

let browser;
const done = [];
const step = (text) => (done.push(text), console.log(`ok   ${text}`));

try {
  const local = start(binary('local'), [
    ...['--no-agent', '--public', '127.0.0.1:0', '--agents', '127.0.0.1:0', '--log-level', 'error'],
  ]);
  const port = await says(local, /^public +\S+:(\d+)$/m);
  const [edge, token] = [await says(local, /^agents +(\S+)$/m), await says(local, /^token +(\S+)$/m)];
  let callback;
  const op = await listening((request, response) => callback(request, response));
  const issuer = `http://127.0.0.1:${op.address().port}`;
  const at = (name) => `http://${name}.localhost:${port}`;
  const back = (name) => `${at(name)}/.agentd/oidc/callback`;
  callback = provide(issuer, [back('web'), back('other'), back('short'), back('auth')]);

  const secret = path.join(folder, 'secret');
  writeFileSync(secret, 'top secret\n');
  chmodSync(secret, 0o600);
  const tunnel = (name, rules) =>
    `[[tunnel]]\nname = "${name}"\nupstream = ${upstream.address().port}\n` +
    (rules
      ? `[tunnel.oidc]\nissuer = "${issuer}"\nclient_id = "tunnel"\nclient_secret_file = "${secret}"\n${rules}\n`
      : '');
  const named = 'allow_emails = ["ann@example.com"]\nallow_groups = ["ops"]';
  const config = path.join(folder, 'agentd.toml');
  writeFileSync(
    config,
    `[edge]\nurl = "${edge}"\ntoken_file = "${token}"\n` +
      tunnel('web', named) +
      tunnel('other', named) +
      tunnel('short', `${named}\nsession = "3s"`) +
      tunnel('sent', `${named}\ncallback_tunnel = "auth"`) +
      tunnel('auth'),
  );
  const agent = start(binary('agentd'), ['run', '--config', config, '--log-format', 'human']);
  const ask = (name, target = '/', fields = {}) =>
    new Promise((resolve, reject) => {
      const options = { host: '127.0.0.1', port, path: target, headers: { host: `${name}.localhost:${port}`, ...fields } };
      http.get(options, (answer) => (answer.resume(), resolve(answer))).on('error', reject);
    });
  await until('the tunnels are open', async () => (await ask('web')).statusCode === 401 && (await ask('auth')).statusCode === 200)
    .catch((error) => assert.fail(`${error.message}\n${agent.said}`));
  assert.equal((await ask('web')).headers['x-tunnel-error'], 'sign_in_required');
  step('a program is told to sign in');

  const root = process.getuid?.() === 0;
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: root ? ['--no-sandbox'] : [] });
  const visits = [];
  const somebody = async () => {
    const context = await browser.newContext();
    context.setDefaultTimeout(PATIENCE);
    const page = await context.newPage();
    page.on('response', (answer) => visits.push(answer.url()));
    return { context, page };
  };
  /** The provider's own pages: who one is, and that the client may know. */
  const signIn = async (page, who) => {
    await page.fill('input[name=login]', who);
    await page.fill('input[name=password]', 'anything');
    await page.click('button[type=submit]');
    await page.click('button[type=submit]');
  };
  const seen = async (page) => JSON.parse(await page.textContent('#seen'));

  const { context, page } = await somebody();
  await page.goto(`${at('web')}/a/b?c=d`);
  assert.ok(page.url().startsWith(`${issuer}/interaction/`), page.url());
  await signIn(page, 'ann');
  assert.deepEqual(await seen(page), { user: 'ann@example.com', url: '/a/b?c=d' });
  assert.equal(page.url(), `${at('web')}/a/b?c=d`);
  step('a page leads to the provider and back to where it was; the service hears who it is, and no cookie');

  const cookies = await context.cookies(at('web'));
  const session = cookies.find((cookie) => cookie.name === '__Host-agentd-session-web');
  assert.ok(session.secure && session.httpOnly && session.sameSite === 'Lax' && session.domain === 'web.localhost');
  assert.equal(await page.evaluate(() => document.cookie), '');
  assert.equal(await page.evaluate(async () => (await fetch('/api', { method: 'POST' })).status), 200);
  step('the session is a cookie that no script sees, and programs of the page have it');

  const came = visits.find((url) => url.startsWith(back('web')));
  await page.goto(came);
  assert.match(await page.textContent('body'), /sign_in_failed/);
  const elsewhere = await somebody();
  await elsewhere.page.goto(came);
  assert.match(await elsewhere.page.textContent('body'), /sign_in_failed/);
  step('what came back from the provider is refused a second time, and in another browser');

  assert.equal((await context.cookies(at('other'))).length, 0);
  const shown = `__Host-agentd-session-other=${session.value}; __Host-agentd-session-web=${session.value}`;
  assert.equal((await ask('other', '/', { cookie: shown })).statusCode, 401);
  visits.length = 0;
  await page.goto(at('other'));
  assert.equal((await seen(page)).user, 'ann@example.com');
  assert.ok(visits.some((url) => url.startsWith(`${issuer}/auth`)), 'the other tunnel asks the provider itself');
  step('two tunnels share no session');

  await page.goto(at('short'));
  assert.equal((await seen(page)).user, 'ann@example.com');
  const kept = (await context.cookies(at('short'))).find((cookie) => cookie.name.includes('session'));
  const asShort = () => ask('short', '/', { cookie: `${kept.name}=${kept.value}` });
  assert.equal((await asShort()).statusCode, 200);
  await until('the session has expired', async () => (await asShort()).statusCode === 401);
  visits.length = 0;
  await page.goto(at('short'));
  assert.ok(visits.some((url) => url.startsWith(`${issuer}/auth`)) && (await seen(page)).user);
  step('an expired session is over, and a page begins a new one');

  await page.goto(`${at('sent')}/x`);
  assert.deepEqual([(await seen(page)).url, page.url()], ['/x', `${at('sent')}/x`]);
  assert.ok(visits.some((url) => url.startsWith(back('auth'))) && visits.some((url) => url.startsWith(back('sent'))));
  step('callback_tunnel: the provider knows one address, and visitors are sent on');

  await page.goto(`${at('web')}/.agentd/oidc/sign-out`);
  assert.match(await page.textContent('body'), /You are signed out/);
  assert.ok(!(await context.cookies(at('web'))).some((cookie) => cookie.name.includes('session')));
  assert.equal((await ask('web', '/', { cookie: `${session.name}=${session.value}` })).statusCode, 401);
  step('signing out ends the session, also for a copy of its cookie');

  const eve = await somebody();
  await eve.page.goto(at('web'));
  await signIn(eve.page, 'eve');
  await eve.page.waitForURL(`${back('web')}**`);
  assert.match(await eve.page.textContent('body'), /visitor_refused/);
  const ops = await somebody();
  await ops.page.goto(at('web'));
  await signIn(ops.page, 'root');
  assert.equal((await seen(ops.page)).user, 'root@example.com');
  step('who is not named stays out; a group lets in');
  console.log(`${done.length} of ${done.length} as they should be`);
} finally {
  await browser?.close();
  for (const child of running.reverse()) {
    if (child.exitCode !== null) continue;
    child.kill('SIGTERM');
    await once(child, 'exit');
  }
}
process.exit(0);
