'use strict';

// Part of `osls package` and `osls deploy`: builds the functions and packs each into a zip; after a
// deployment, says where everything is.

const { spawnSync } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');
const { ZipFile } = require('yazl');
const { publicKeys } = require('./settings.js');

/** The most bytes of one zip: what a cold start has to load. */
const ZIP_BYTES = 6 * 1024 * 1024;

/** What builds the functions: how to ask for its version, the least one, and where it comes from. cargo-lambda 1.9.2 is
 * the first that knows Rust 1.98's linker arguments; it finds zig beside it or as `python3 -m ziglang`. */
const TOOLS = [
  [['cargo', 'lambda', '--version'], [1, 9, 2], 'pip install cargo-lambda==1.9.2'],
];

class Tunnel {
  constructor(serverless, _options, { log }) {
    this.serverless = serverless;
    this.log = log;
    this.hooks = {
      'before:package:createDeploymentArtifacts': () => this.build(),
      'after:aws:info:displayStackOutputs': () => this.tell(),
    };
  }

  async build() {
    const { service, serviceDir } = this.serverless;
    const { settings } = service.custom;
    const names = service.getAllFunctions();
    const folder = path.join(serviceDir, 'target', 'lambda');
    if (settings.build === 'cargo-lambda') this.compile(names, settings, folder);
    for (const name of names) {
      const files = [['bootstrap', path.join(folder, name, 'bootstrap'), 0o100755]];
      if (name === 'authorizer' && settings.jwks) {
        const jwks = path.resolve(serviceDir, settings.jwks);
        publicKeys(jwks);
        files.push(['jwks.json', jwks, 0o100644]);
      }
      const zip = path.join(serviceDir, service.getFunction(name).package.artifact);
      const bytes = await pack(files, zip);
      this.log.info(`${name}: ${bytes} bytes`);
      if (bytes > ZIP_BYTES) throw new Error(`${zip} has ${bytes} bytes, more than ${ZIP_BYTES}`);
    }
  }

  /** Says what is missing or too old before a build that takes minutes. */
  tools() {
    for (const [command, least, help] of TOOLS) {
      const { stdout, error, status } = spawnSync(command[0], command.slice(1), { encoding: 'utf8' });
      const found = /([0-9]+)\.([0-9]+)(?:\.([0-9]+))?/.exec(stdout ?? '');
      if (error || status !== 0 || !found) throw new Error(`${command.join(' ')} does not run: ${help}`);
      const parts = found.slice(1).map((part) => Number(part ?? 0));
      const older = parts.map((part, at) => part - least[at]).find((difference) => difference !== 0) < 0;
      if (older) throw new Error(`${command[0]} ${found[0]} is too old, ${least.join('.')} is needed: ${help}`);
    }
  }

  compile(names, settings, folder) {
    this.tools();
    const target = settings.architecture === 'arm64' ? '--arm64' : '--x86-64';
    const packages = names.flatMap((name) => ['-p', name]);
    const command = ['lambda', 'build', '--release', target, '--locked', '--lambda-dir', folder, ...packages];
    this.log.notice(`cargo ${command.join(' ')}`);
    const { status, error } = spawnSync('cargo', command, {
      cwd: this.serverless.serviceDir,
      stdio: ['ignore', 'inherit', 'inherit'],
    });
    if (error || status !== 0) {
      const help = 'it needs cargo-lambda (pip install cargo-lambda) and the Rust target of the architecture';
      throw new Error(`the functions could not be built: ${help}`);
    }
  }

  /** Agents' address, public address, next command: the outputs of the stack. */
  tell() {
    const info = this.serverless.pluginManager.plugins.find(({ constructor }) => constructor.name === 'AwsInfo');
    const outputs = new Map(
      (info?.gatheredData?.outputs ?? []).map(({ OutputKey, OutputValue }) => [OutputKey, OutputValue])
    );
    for (const name of ['AgentsUrl', 'PublicUrl', 'FrontTarget', 'Next']) {
      if (outputs.has(name)) this.serverless.addServiceOutputSection(name, outputs.get(name));
    }
  }
}

/** Packs files into a zip that depends on nothing but their content. */
async function pack(files, zip) {
  const archive = new ZipFile();
  for (const [name, file, mode] of files) {
    let content;
    try {
      content = fs.readFileSync(file);
    } catch (error) {
      throw new Error(`${file} cannot be read (${error.code}); build it, or leave --param build=none out`);
    }
    archive.addBuffer(content, name, { mtime: new Date(2000, 0, 1), mode });
  }
  archive.end();
  fs.mkdirSync(path.dirname(zip), { recursive: true });
  await new Promise((resolve, reject) => {
    archive.outputStream.pipe(fs.createWriteStream(zip)).on('close', resolve).on('error', reject);
  });
  return fs.statSync(zip).size;
}

module.exports = Tunnel;
