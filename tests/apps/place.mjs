// What a case stands on: processes, the edge, tunnels, and clients that find names of a domain without DNS.

import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdtempSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as pause } from 'node:timers/promises';
import { promisify } from 'node:util';
import { chromium } from 'playwright-core';

export const here = import.meta.dirname;
export const venv = (program) => path.join(process.env.VENV, 'bin', program);
export const script = (name) => path.join(here, '..', 'node_modules', '.bin', name);
const binary = (name) => path.join(process.env.BINARIES, name);

/** How long anything may take to come true. Not a measure of speed: development servers compile. */
export const PATIENCE = 90_000;

/** Of development servers that trust few names, with a form that is guarded by the page's origin. */
export const formRecipes = [
  { rule: 'upstream', how: '`--origin upstream`', flags: ['--origin', 'upstream'] },
  { rule: 'preserve', how: '`server.allowedHosts`', settings: true },
];

const running = new Set();

/** A process with its own group, and what it has said. */
export class Process {
  constructor(command, args, options = {}) {
    const { env, ...others } = options;
    this.said = '';
    this.child = spawn(command, args, {
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
      ...others,
    });
    for (const stream of [this.child.stdout, this.child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => (this.said = (this.said + text).slice(-200_000)));
    }
    this.child.on('error', (error) => (this.said += `\n${command}: ${error.message}`));
    running.add(this);
  }

  get ended() {
    return this.child.exitCode !== null || this.child.signalCode !== null || this.child.pid === undefined;
  }

  /** The match of `pattern` in what it says. */
  async says(pattern) {
    return until(`a line like ${pattern} of ${this.child.spawnfile}`, () => {
      const found = this.said.match(pattern);
      if (!found && this.ended) throw new Fatal(`${this.child.spawnfile} ended:\n${this.said.slice(-2000)}`);
      return found;
    });
  }

  async stop() {
    running.delete(this);
    if (this.ended) return;
    const gone = once(this.child, 'exit');
    this.signal('SIGTERM');
    const late = setTimeout(() => this.signal('SIGKILL'), 5000);
    await gone;
    clearTimeout(late);
    // Whoever of its group is left.
    this.signal('SIGKILL');
  }

  signal(name) {
    try {
      process.kill(-this.child.pid, name);
    } catch {
      // The group has ended.
    }
  }
}

export async function stopAll() {
  await Promise.all([...running].map((one) => one.stop()));
}

class Fatal extends Error {}

/** Asks `question` again until its answer is true. */
export async function until(what, question) {
  const end = Date.now() + PATIENCE;
  let last;
  for (;;) {
    try {
      const answer = await question();
      if (answer) return answer;
    } catch (error) {
      if (error instanceof Fatal) throw error;
      last = error;
    }
    if (Date.now() > end) throw new Error(`never came true: ${what}${last ? ` (${last.message})` : ''}`);
    await pause(50);
  }
}

export async function freePort() {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

async function listens(port, of) {
  await until(`port ${port} is open`, () => {
    if (of.ended) throw new Fatal(`the application ended:\n${of.said.slice(-3000)}`);
    return new Promise((resolve) => {
      // Some listen on one family of localhost only, which is what a tunnel to a port bears too.
      const socket = net.connect({ host: 'localhost', port });
      socket.once('connect', () => resolve(true)).once('error', () => resolve(false));
      socket.once('connect', () => socket.destroy());
    });
  });
}

/** An edge whose tunnels are under `domain`. */
export class Edge {
  static async start(domain) {
    const edge = new Edge();
    edge.domain = domain;
    edge.process = new Process(binary('local'), [
      ...['--no-agent', '--public', '127.0.0.1:0', '--agents', '127.0.0.1:0'],
      ...['--domain', domain, '--log-level', 'warn'],
    ]);
    const value = async (name) => (await edge.process.says(new RegExp(`^${name} +(\\S+)$`, 'm')))[1];
    edge.port = Number((await value('public')).match(/:(\d+)$/)[1]);
    edge.agents = await value('agents');
    edge.token = await value('token');
    return edge;
  }
}

/** One browser for all; names under the domain lead to this machine. */
export async function openBrowser(domain) {
  const root = process.getuid?.() === 0;
  return chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: [`--host-resolver-rules=MAP *.${domain} 127.0.0.1`, ...(root ? ['--no-sandbox'] : [])],
  });
}

/** Where one case runs with one recipe under one domain. */
export class Place {
  constructor(edge, browser, name, recipe, shared) {
    Object.assign(this, { edge, browser, name, recipe, shared });
    this.folder = mkdtempSync(path.join(here, '..', `${name}-`));
    this.source = path.join(here, 'cases', name);
    this.host = `${name}.${edge.domain}`;
    this.authority = `${this.host}:${edge.port}`;
    this.url = `http://${this.authority}`;
    this.logs = [];
    this.sockets = [];
  }

  /** A tunnel to `upstream`, with the flags of the recipe. */
  async tunnel(upstream) {
    this.agent = new Process(binary('agentd'), [
      ...['http', upstream, '--name', this.name, '--edge', this.edge.agents, '--token-file', this.edge.token],
      ...['--host-header', this.recipe.rule, ...(this.recipe.flags ?? [])],
    ]);
    await this.agent.says(/ -> /);
  }

  /** The application, once it listens. */
  async app(port, command, args, options = {}) {
    this.application = new Process(command, args, { cwd: this.folder, ...options });
    await listens(port, this.application);
    return this.application;
  }

  /** A program of this place that is waited for; what it printed. */
  async run(command, args, options = {}) {
    const { env, ...others } = options;
    const done = await promisify(execFile)(command, args, {
      cwd: this.folder,
      env: { ...process.env, ...env },
      maxBuffer: 64 << 20,
      timeout: 4 * PATIENCE,
      ...others,
    });
    return done.stdout + done.stderr;
  }

  /** curl, which is told where the name is; what it printed. */
  curl(...args) {
    const known = `${this.authority}:127.0.0.1`;
    return this.run('curl', ['--silent', '--show-error', '--max-time', '30', '--resolve', known, ...args]);
  }

  /** For clients written in Node.js, with `node --import`: every name is this machine. */
  get names() {
    return path.join(here, 'names.mjs');
  }

  /** A page of a browser without a past. */
  async page() {
    this.context = await this.browser.newContext({ viewport: { width: 1200, height: 900 } });
    this.context.setDefaultTimeout(PATIENCE);
    const page = await this.context.newPage();
    page.on('console', (message) => this.logs.push(`${message.type()}: ${message.text()}`));
    page.on('pageerror', (error) => this.logs.push(`error: ${error.message}`));
    page.on('websocket', (socket) => this.sockets.push(socket.url()));
    page.on('websocket', (socket) => socket.on('socketerror', (error) => this.logs.push(`websocket: ${error}`)));
    return page;
  }

  /** Copies the application of a case; the setting `server` that its recipe wants, as JavaScript. */
  server() {
    cpSync(`${this.source}/app`, this.folder, { recursive: true });
    return JSON.stringify(this.recipe.settings ? { allowedHosts: [this.host] } : {});
  }

  /** A form of a page, sent by a browser, whose answer is the page with what was said. */
  async form() {
    const page = await this.page();
    // Development servers load a page anew once they have found what it is made of.
    await until('the form is saved', async () => {
      await page.goto(this.url);
      await page.getByLabel('word').fill('hello');
      await page.getByRole('button', { name: 'save' }).click();
      await page.getByText('saved: hello').waitFor({ timeout: 10_000 });
      return true;
    });
  }

  /** Fails where a page went past the tunnel: on the developer's own machine that works, and nowhere else. */
  checkSockets() {
    const past = this.sockets.filter((url) => !url.startsWith(`ws://${this.authority}/`));
    if (past.length) throw new Error(`WebSockets past the tunnel: ${past.join(' ')}`);
  }

  /** What `agentd http` advised. */
  get hints() {
    return (this.agent?.said.match(/^.*hint.*$/gm) ?? []).map((line) => line.trim());
  }

  async close() {
    await this.context?.close();
    await this.agent?.stop();
    await this.application?.stop();
  }
}

/** Says that the page has not been loaded anew since [`marked`]. */
export const mark = (page) => page.evaluate(() => void (globalThis.theSamePage = true));
export async function unmoved(page) {
  if (!(await page.evaluate(() => globalThis.theSamePage === true))) throw new Error('the page was loaded anew');
}
