'use strict';

// Part of `osls package` and `osls deploy`: builds the functions and packs each into a zip; after a
// deployment, says where everything is.

const { spawnSync } = require('node:child_process');
const crypto = require('node:crypto');
const fs = require('node:fs');
const path = require('node:path');
// Of osls, which is what deploys.
const { InvokeCommand, LambdaClient } = require(
  require.resolve('@aws-sdk/client-lambda', { paths: [require.resolve('osls')] })
);
const { ListObjectsV2Command, PutObjectCommand, S3Client } = require(
  require.resolve('@aws-sdk/client-s3', { paths: [require.resolve('osls')] })
);
const { ZipFile } = require('yazl');
const { publicKeys } = require('./settings.js');

/** The most bytes of one zip: what a cold start has to load. `ingress` and `sweep`, which keep and look after deliveries,
 * have 6.4 MB. */
const ZIP_BYTES = 6.5 * 1024 * 1024;

/** What builds the functions: the ways to ask for its version, the least one, and where it comes from. cargo-lambda 1.9.2
 * is the first that knows Rust 1.98's linker arguments. It links with zig, which it finds as `zig` or as a module of
 * Python; older ones than 0.13 do not know AL2023's linker options. */
const TOOLS = [
  [[['cargo', 'lambda', '--version']], [1, 9, 2], 'pip install cargo-lambda==1.9.2'],
  [[['zig', 'version'], ['python3', '-m', 'ziglang', 'version']], [0, 13, 0], 'pip install ziglang'],
];

/** The least Node.js and osls: package.json and package-lock.json name them. */
function runtimes(node, osls) {
  const { engines, devDependencies } = require('../package.json');
  const [major, minor] = node.split('.').map(Number);
  const fits = engines.node.split('||').some((range) => {
    const [, sign, least, at = 0] = /(\^|>=)([0-9]+)(?:\.([0-9]+))?/.exec(range);
    return sign === '^' ? major === Number(least) && minor >= Number(at) : major >= Number(least);
  });
  if (!fits) throw new Error(`Node.js ${node} is not one of ${engines.node}: install one of those`);
  if (osls !== devDependencies.osls) {
    throw new Error(`osls ${osls} is not the ${devDependencies.osls} that this stack was tried with: run npm ci, then npx osls`);
  }
}

/** Says what is missing or too old. `run` gives what a command prints, or nothing where it does not run. */
function check(tools, run) {
  for (const [ways, least, help] of tools) {
    const names = ways.map((way) => way.join(' ')).join(' or ');
    const printed = ways.map(run).find((text) => text !== undefined);
    const found = /([0-9]+)\.([0-9]+)(?:\.([0-9]+))?/.exec(printed ?? '');
    if (!found) throw new Error(`${names} does not run: ${help}`);
    const parts = found.slice(1).map((part) => Number(part ?? 0));
    const older = parts.map((part, at) => part - least[at]).find((difference) => difference !== 0) < 0;
    if (older) throw new Error(`${names} is ${found[0]}, and ${least.join('.')} is needed: ${help}`);
  }
}

class Tunnel {
  constructor(serverless, _options, { log }) {
    this.serverless = serverless;
    this.log = log;
    this.hooks = {
      'before:package:createDeploymentArtifacts': () => this.build(),
      'after:aws:package:finalize:mergeCustomProviderResources': () => this.nameRelay(),
      'before:aws:deploy:deploy:uploadArtifacts': () => this.uploadRelay(),
      'before:remove:remove': () => this.tellLoss(),
      'after:aws:info:displayStackOutputs': () => this.tell(),
    };
  }

  async build() {
    const { service, serviceDir } = this.serverless;
    const { settings } = service.custom;
    runtimes(process.versions.node, this.serverless.version);
    const names = service.getAllFunctions();
    const folder = path.join(serviceDir, 'target', 'lambda');
    const programs = settings.relay === 'none' ? names : [...names, 'relay'];
    if (settings.build === 'cargo-lambda') this.compile(programs, settings, folder);
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
    check(TOOLS, (command) => {
      const { stdout, error, status } = spawnSync(command[0], command.slice(1), { encoding: 'utf8' });
      return error || status !== 0 ? undefined : stdout;
    });
  }

  compile(names, settings, folder) {
    this.tools();
    const target = settings.architecture === 'arm64' ? '--arm64' : '--x86-64';
    const packages = names.flatMap((name) => ['-p', name]);
    const command = ['lambda', 'build', '--profile', 'dist', target, '--locked', '--lambda-dir', folder, ...packages];
    this.log.notice(`cargo ${command.join(' ')}`);
    const { status, error } = spawnSync('cargo', command, {
      cwd: this.serverless.serviceDir,
      stdio: ['ignore', 'inherit', 'inherit'],
    });
    if (error || status !== 0) {
      const triple = settings.architecture === 'arm64' ? 'aarch64-unknown-linux-gnu' : 'x86_64-unknown-linux-gnu';
      const help = `the lines above say why; the Rust target is added by: rustup target add ${triple}`;
      throw new Error(`the functions could not be built: ${help}`);
    }
  }

  /** The program of relay and its hash, where there is a relay. */
  relay() {
    const { service, serviceDir } = this.serverless;
    if (service.custom.settings.relay === 'none') return null;
    const program = content(path.join(serviceDir, 'target', 'lambda', 'relay', 'bootstrap'));
    return { program, hash: crypto.createHash('sha256').update(program).digest('hex') };
  }

  /** Writes the hash of relay's program into its task: only another program makes another task. */
  nameRelay() {
    const relay = this.relay();
    if (!relay) return;
    const { Resources } = this.serverless.service.provider.compiledCloudFormationTemplate;
    for (const variable of Resources.RelayTask.Properties.ContainerDefinitions[0].Environment) {
      if (typeof variable.Value === 'string') variable.Value = variable.Value.replace('PROGRAM_SHA256', relay.hash);
    }
  }

  /** Puts relay's program where its tasks fetch it. Nothing that is there is overwritten or taken away: a task of the
   * version before may start at any time, and the bucket is emptied with the stack. */
  async uploadRelay() {
    const relay = this.relay();
    if (!relay) return;
    const { service } = this.serverless.service;
    const provider = this.serverless.getProvider('aws');
    const Bucket = await provider.getServerlessDeploymentBucketName();
    const Key = `${provider.getDeploymentPrefix()}/${service}/${provider.getStage()}/relay/${relay.hash}`;
    const s3 = new S3Client(await provider.getAwsSdkV3Config());
    const { Contents } = await s3.send(new ListObjectsV2Command({ Bucket, Prefix: Key, MaxKeys: 1 }));
    if (Contents?.length) return;
    this.log.notice(`relay: ${relay.program.length} bytes`);
    await s3.send(new PutObjectCommand({ Bucket, Key, Body: relay.program }));
  }

  /** Before the stack goes: how many deliveries go with it. Asked of `sweep`, which counts them anyway. */
  async tellLoss() {
    const provider = this.serverless.getProvider('aws');
    const FunctionName = this.serverless.service.getFunction('sweep').name;
    let waiting;
    try {
      const lambda = new LambdaClient(await provider.getAwsSdkV3Config());
      const { FunctionError, Payload } = await lambda.send(new InvokeCommand({ FunctionName, Payload: '{}' }));
      if (!FunctionError) ({ waiting } = JSON.parse(Buffer.from(Payload).toString()));
    } catch (error) {
      this.log.info(`${FunctionName}: ${error.message}`);
    }
    this.log.warning(lossOf(waiting));
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

/** What is said before the stack goes; `waiting` is what `sweep` has counted, if it could be asked. */
function lossOf(waiting) {
  if (waiting === 0) return 'No delivery waits for an agent; those between two attempts are lost, and so are the dead ones';
  const count = waiting === undefined ? 'Deliveries that wait' : `At least ${waiting} deliveries that wait`;
  return `${count} for an agent are lost with the stack: their senders were told that they are kept`;
}

/** What was built. */
function content(file) {
  try {
    return fs.readFileSync(file);
  } catch (error) {
    throw new Error(`${file} cannot be read (${error.code}); build it, or leave --param build=none out`);
  }
}

/** Packs files into a zip that depends on nothing but their content. */
async function pack(files, zip) {
  const archive = new ZipFile();
  for (const [name, file, mode] of files) {
    archive.addBuffer(content(file), name, { mtime: new Date(2000, 0, 1), mode, compressionLevel: 9 });
  }
  archive.end();
  fs.mkdirSync(path.dirname(zip), { recursive: true });
  await new Promise((resolve, reject) => {
    archive.outputStream.pipe(fs.createWriteStream(zip)).on('close', resolve).on('error', reject);
  });
  return fs.statSync(zip).size;
}

module.exports = Tunnel;
module.exports.lossOf = lossOf;
module.exports.check = check;
module.exports.runtimes = runtimes;
module.exports.TOOLS = TOOLS;
